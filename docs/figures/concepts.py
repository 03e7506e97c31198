"""Draws the pictures of docs/concepts.md: `python -m docs.figures.concepts`.

`streams.svg`: a recording heard and answered aloud, position by position, from the layout of the shipped processor.
`memory.svg`: what one conversation holds, by length, from the preset of Kimi-Linear-48B-A3B.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

import kimi_mm
from kimi_mm.conversion.presets import kimi_linear
from kimi_mm.text.backbone import Backbone
from kimi_mm.text.cache import KDAState

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parents[1]
KINDS = {"text_blank": "blank", "media_pad": "heard", "said": "said"}
COLOURS = {"blank": "#f2f2f2", "mark": "#c9d6ea", "heard": "#7fb3d5", "text": "#f5c26b", "said": "#8cc084"}


def streams(path: Path) -> None:
    """Two streams of equal length: what is heard, and a reply in text and, a few steps behind it, in codes."""
    model = kimi_mm.load("nano")
    vocab = model.config.vocab
    layout = model.processor.transcription(6)
    names = {vocab.special(name): name for name in vocab.specials}
    audio = [names.get(int(i), "media_pad") for i in layout.audio]
    text = [names.get(int(i), str(int(i))) for i in layout.text]
    words, delay = ["Call", " me", " back", "."], 2
    audio += ["text_blank"] * delay + ["said"] * 7 + ["msg_end"]
    text += [*words, "text_eos"]
    text += ["text_blank"] * (len(audio) - len(text))
    figure, axis = plt.subplots(figsize=(11, 2.1), layout="constrained")
    for row, (label, ids) in enumerate((("text", text), ("audio", audio))):
        axis.text(-0.3, row + 0.5, label, ha="right", va="center", fontsize=9)
        for at, name in enumerate(ids):
            kind = KINDS.get(name, "text" if name in words else "mark")
            axis.add_patch(plt.Rectangle((at, row), 0.94, 0.9, color=COLOURS[kind]))
            shown = "" if kind in ("blank", "heard", "said") else name.strip().replace("_", "\n")
            axis.text(at + 0.47, row + 0.45, shown, ha="center", va="center", fontsize=6.5, linespacing=0.9)
    for at, row, label in ((1.5, 1, "codes and features of the recording"), (14, 1, "codes of the answer")):
        axis.text(at + 0.6, row + 0.98, label, va="bottom", fontsize=8)
    axis.set(xlim=(-1.6, len(audio)), ylim=(0, 2.4))
    axis.axis("off")
    _save(figure, path)


def memory(path: Path) -> None:
    """A fixed state for each KDA layer, small latents for each MLA layer, against keys and values of every head."""
    config = kimi_linear().backbone
    with torch.device("meta"):
        backbone = Backbone(config)
    fixed = latent = 0
    for state in backbone.new_cache(1, device="meta").layers:
        if isinstance(state, KDAState):
            fixed += sum(tensor.numel() for tensor in state.tensors().values()) * 4
        else:
            latent += state.rows.shape[2:].numel() * 2
    mla = config.mla
    assert mla is not None
    layers = len(config.trunk) + len(config.text_branch)
    full = layers * mla.num_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim) * 2
    lengths = [2**n for n in range(10, 21)]
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    axis.loglog(lengths, [full * n / 1e9 for n in lengths], label="keys and values of every head, in every layer")
    axis.loglog(lengths, [(fixed + latent * n) / 1e9 for n in lengths], label="3 KDA layers to each MLA layer")
    axis.axhline(fixed / 1e9, color="grey", linestyle=":", label="of it the KDA states")
    axis.set(
        xlabel="positions",
        ylabel="GB",
        title="One conversation of Kimi-Linear-48B-A3B: states in fp32, the rest in bf16",
    )
    axis.set_xticks([2**10, 2**13, 2**17, 2**20], ["1 k", "8 k", "128 k", "1 M"])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    # No date, and the same ids each time: the files change only when the picture does.
    plt.rcParams["svg.hashsalt"] = "kimi_mm"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    streams(DOCS / "streams.svg")
    memory(DOCS / "memory.svg")
