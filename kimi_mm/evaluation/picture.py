"""Pictures of what a model hears (waveform, log-mel, codes and text of a recording), says, and sees."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kimi_mm.types import Transcript

SAMPLE_RATE = 16_000


def draw(
    path: Path, wave: np.ndarray, mel: np.ndarray, codes: np.ndarray, transcript: Transcript, title: str, caption: str
) -> None:
    """Draws a recording and its transcript into a PNG file, written aside and renamed.

    Args:
        path: the picture; its folder is made if missing.
        wave: [S] float32 at 16 kHz.
        mel: [frames, bins] log-mel, 100 frames a second.
        codes: [N] int, 12.5 a second.
        transcript: of the recording.
        title: above the picture.
        caption: below the picture, for instance the reference and its WER.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seconds = len(wave) / SAMPLE_RATE
    figure, axes = plt.subplots(
        4, 1, figsize=(12, 6.4), sharex=True, gridspec_kw={"height_ratios": (1.5, 2.2, 0.55, 1.1)}, layout="constrained"
    )
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    _waveform(axes[0], wave)
    axes[1].imshow(mel.T, origin="lower", aspect="auto", cmap="magma", extent=(0, mel.shape[0] / 100, 0, mel.shape[1]))
    axes[1].set_ylabel("mel bin")
    _codes(axes[2], codes, seconds)
    _text(axes[3], transcript)
    axes[3].set_xlim(0, seconds)
    axes[3].set_xlabel("seconds")
    figure.supxlabel(textwrap.fill(caption, 150), fontsize=10, x=0.01, ha="left")
    _write(figure, path)


def draw_speech(path: Path, spoken: dict[str, np.ndarray], frame_rate: float, title: str) -> None:
    """Draws spectrograms one below the other into a PNG file, written aside and renamed.

    Args:
        path: the picture; its folder is made if missing.
        spoken: log-mel [frames, bins] by what it shows; all share the time axis and the colours.
        frame_rate: mel frames a second.
        title: above the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(spoken), 1, figsize=(12, 2.3 * len(spoken) + 0.6), sharex=True, squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    loudest = max(float(mel.max()) for mel in spoken.values())
    for axis, (name, mel) in zip(axes[:, 0], spoken.items(), strict=True):
        extent = (0, len(mel) / frame_rate, 0, mel.shape[1])
        # Nine nepers, 78 dB, below the loudest everything is as good as silent.
        axis.imshow(mel.T, origin="lower", aspect="auto", cmap="magma", extent=extent, vmin=loudest - 9.0, vmax=loudest)
        axis.set_title(textwrap.shorten(name, 140), fontsize=10, loc="left")
        axis.set_ylabel("mel bin")
    axes[-1, 0].set_xlim(0, max(len(mel) for mel in spoken.values()) / frame_rate)
    axes[-1, 0].set_xlabel("seconds")
    _write(figure, path)


def draw_answers(
    path: Path, answered: Sequence[tuple[np.ndarray, str, str, bool]], title: str, columns: int = 4
) -> None:
    """Draws pictures with the answers to questions about them into a PNG file, written aside and renamed.

    Args:
        path: the picture; its folder is made if missing.
        answered: picture [H, W, 3], question, answer, and whether it is right.
        title: above all.
        columns: pictures in a row.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(answered) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3 * columns, 3.3 * rows + 0.5), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (picture, question, answer, right) in zip(axes.flat, answered, strict=False):
        axis.imshow(picture)
        axis.set_title(textwrap.fill(question, 34), fontsize=10)
        text = textwrap.fill(textwrap.shorten(answer, 90), 34)
        color = "#276749" if right else "#c53030"
        axis.text(0.5, -0.04, text, transform=axis.transAxes, ha="center", va="top", fontsize=10, color=color)
    _write(figure, path)


def _write(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(aside, dpi=100, format="png", metadata={"Software": None})
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
        plt.close(figure)


def _waveform(axis, wave: np.ndarray, columns: int = 1600) -> None:
    """Draws the range of each of `columns` stretches, so that an hour costs no more than a second."""
    edges = np.linspace(0, len(wave), min(columns, len(wave)) + 1).astype(int)[:-1]
    times = edges / SAMPLE_RATE
    axis.fill_between(
        times, np.minimum.reduceat(wave, edges), np.maximum.reduceat(wave, edges), color="#2b6cb0", lw=0.4
    )
    axis.set_ylabel("wave")
    axis.set_yticks([])


def _codes(axis, codes: np.ndarray, seconds: float, most_labels: int = 90) -> None:
    """Draws the codes as a strip; neighbouring code numbers get unrelated colours."""
    shuffled = (codes.astype(np.uint64) * np.uint64(2654435761) % np.uint64(2**32)) / 2.0**32
    width = 1 / 12.5
    axis.imshow(
        shuffled[None].astype(np.float64),
        aspect="auto",
        cmap="rainbow",
        alpha=0.6,
        vmin=0,
        vmax=1,
        extent=(0, width * len(codes), 0, 1),
    )
    if len(codes) <= most_labels:
        for index, code in enumerate(codes):
            axis.text(
                (index + 0.5) * width, 0.5, str(code), rotation=90, fontsize=6, ha="center", va="center", clip_on=True
            )
    axis.set_yticks([])
    axis.set_ylabel(f"{len(codes)} codes", rotation=0, ha="right", va="center")


def _text(axis, transcript: Transcript) -> None:
    whole = max(transcript.duration, 1e-3)
    for segment in transcript.segments:
        axis.axvspan(segment.start, segment.end, ymin=0.05, ymax=0.95, color="#e2e8f0", ec="#718096")
        letters = max(int(150 * (segment.end - segment.start) / whole), 12)
        lines = [*textwrap.wrap(segment.text, letters), f"{segment.start:.2f} - {segment.end:.2f} s"]
        axis.text((segment.start + segment.end) / 2, 0.5, "\n".join(lines), ha="center", va="center", fontsize=9.5)
    axis.set_ylim(0, 1)
    axis.set_yticks([])
    axis.set_ylabel("text", rotation=0, ha="right", va="center")
