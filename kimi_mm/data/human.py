"""Writes the human sets: adaptation half, test half, unlabelled speech, and the clips that ship for the demo.

out/adapt/*.flac + manifest.jsonl    out/test/*.flac + manifest.jsonl    out/report.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile

from kimi_mm.data.asterisk import ATTRIBUTION, SAMPLE_RATE, Prompt, list_recordings, load_audio, prepare_prompts
from kimi_mm.data.manifest import read_rows, resolve, write_aside, write_manifest, write_rows
from kimi_mm.data.shards import Clip
from kimi_mm.errors import UserError

ROW = {"id": str, "file": str, "text": str, "seconds": float, "scored": bool}
UNLABELLED = ("fr", "it", "ru")
# Diverse clips of the test half, two to ten seconds each.
DEMO_KEYS = (
    "dir-instr",
    "vm-newuser",
    "followme/status",
    "ss-noservice",
    "vm-nobox",
    "tt-weasels",
    "vm-instructions",
    "privacy-unident",
)


def prepare_human(
    out: str | Path, packages: str | Path | None = None, *, progress: Callable[[str], None] = lambda _: None
) -> dict:
    """Prepares both halves of the human set as FLAC files with manifests.

    Args:
        out: folder to write to; `adapt` and `test` are made in it.
        packages: folder of downloaded packages, or None to download by name.
        progress: called with a line before each step.

    Returns:
        The report that is also written to `report.json`: clips, scored clips, words and seconds of each half, and the
        sizes of the largest components in words.
    """
    out = Path(out)
    prompts, audio, sizes = prepare_prompts(packages, progress=progress)
    report: dict = {"components": sizes[:10]}
    for half in ("adapt", "test"):
        chosen = [prompt for prompt in prompts if prompt.half == half]
        progress(f"writing {len(chosen)} clips of the {half} half")
        write_clips(out / half, chosen, audio)
        scored = [p for p in chosen if p.scored]
        report[half] = {
            "clips": len(chosen),
            "scored_clips": len(scored),
            "scored_words": sum(len(p.text.split()) for p in scored),
            "seconds": round(sum(p.seconds for p in chosen), 1),
            "scored_seconds": round(sum(p.seconds for p in scored), 1),
        }
    write_aside(out / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def write_clips(folder: Path, prompts: Sequence[Prompt], audio: dict[str, np.ndarray]) -> None:
    """Writes prompts as FLAC with `manifest.jsonl`, ATTRIBUTION.txt and checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, paths = [], []
    for prompt in prompts:
        path = folder / f"{prompt.key.replace('/', '-')}.flac"
        soundfile.write(path, audio[prompt.key], SAMPLE_RATE, subtype="PCM_16", compression_level=1.0)
        paths.append(path)
        rows.append(
            {
                "id": prompt.key,
                "file": path.name,
                "text": prompt.text,
                "seconds": prompt.seconds,
                "half": prompt.half,
                "scored": prompt.scored,
            }
        )
    write_rows(folder / "manifest.jsonl", rows)
    write_aside(folder / "ATTRIBUTION.txt", ATTRIBUTION.encode())
    write_manifest(folder, "clips", [*paths, folder / "manifest.jsonl"])


def read_clips(folder: str | Path, *, scored_only: bool = False) -> list[Clip]:
    """Reads a folder of clips (`manifest.jsonl` and audio files at 16 kHz).

    Raises:
        UserError: names the manifest's line or the file that cannot be used.
    """
    folder = Path(folder)
    clips = []
    for number, row in enumerate(read_rows(folder / "manifest.jsonl", ROW), start=1):
        if scored_only and not row["scored"]:
            continue
        path = resolve(folder, row["file"], f"{folder / 'manifest.jsonl'}:{number}")
        try:
            wave, rate = soundfile.read(path, dtype="int16")
        except soundfile.LibsndfileError as error:
            raise UserError(f"{path}: cannot be read ({error}); prepare the human set again.") from None
        if rate != SAMPLE_RATE or wave.ndim != 1:
            raise UserError(f"{path}: must be mono at {SAMPLE_RATE} Hz; prepare the human set again.")
        clips.append(Clip(row["id"], row["text"], "human-allison", wave))
    return clips


def write_demo(folder: str | Path, prepared: str | Path) -> None:
    """Copies the clips that ship with the package out of the prepared test half.

    Args:
        folder: where to write the FLACs, `manifest.jsonl` and `ATTRIBUTION.txt`.
        prepared: the `out` of `prepare_human`.
    """
    folder, source = Path(folder), Path(prepared) / "test"
    rows = {row["id"]: row for row in read_rows(source / "manifest.jsonl", ROW)}
    chosen = []
    for key in DEMO_KEYS:
        if key not in rows:
            raise UserError(f"{source}: has no clip '{key}', which the demo ships; prepare the human set again.")
        row = rows[key]
        write_aside(folder / row["file"], (source / row["file"]).read_bytes())
        chosen.append(row)
    write_rows(folder / "manifest.jsonl", chosen)
    write_aside(folder / "ATTRIBUTION.txt", ATTRIBUTION.encode())


def prepare_unlabelled(
    path: str | Path,
    minutes: float,
    packages: str | Path | None = None,
    *,
    seed: int = 0,
    bit_rate_quality: float = 0.9,
    progress: Callable[[str], None] = lambda _: None,
) -> float:
    """Writes human speech without transcripts (French, Italian and Russian prompts) as one Ogg/Opus file.

    Args:
        path: the `.ogg` file.
        minutes: how much speech; equal shares of each language, clips drawn at random from 2 to 20 s.
        packages: folder of downloaded packages.
        seed: of the draw.
        bit_rate_quality: soundfile's compression level, 0 best to 1 smallest.

    Returns:
        The minutes written.
    """
    rng = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    for language in UNLABELLED:
        package = f"asterisk-core-sounds-{language}-g722"
        lengths = list_recordings(package, packages)
        usable = [key for key, seconds in lengths.items() if 2.0 <= seconds <= 20.0]
        chosen, budget = [], minutes * 60 / len(UNLABELLED)
        for index in rng.permutation(len(usable)):
            if budget <= 0:
                break
            chosen.append(usable[index])
            budget -= lengths[usable[index]]
        progress(f"decoding {len(chosen)} recordings of {package}")
        waves = load_audio(chosen, packages, package=package).values()
        # The packages hold seconds of silence under names like any other.
        parts += [wave for wave in waves if np.abs(wave.astype(np.int32)).max() >= 500]
    joined = np.concatenate(parts)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with soundfile.SoundFile(
        path, "w", SAMPLE_RATE, 1, format="OGG", subtype="OPUS", compression_level=bit_rate_quality
    ) as file:
        # libsndfile's Opus encoder overflows its stack on one long write.
        for start in range(0, len(joined), SAMPLE_RATE):
            file.write(joined[start : start + SAMPLE_RATE])
    return len(joined) / SAMPLE_RATE / 60
