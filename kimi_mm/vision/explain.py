"""Where an answer looked: attention of its words to the rows of pictures, and a picture of it.

    prompt + answer ─► backbone, once ─► in every softmax layer (MLA, GQA): weights from each answer token to the rows
                    ─► mean over heads and layers ─► share of each cell, per token ─► summed per word ─► heat maps

Layers with a recurrent state (KDA) have no such weights; what they carried is not in the picture.

Shapes: T positions, H heads, E head channels, A answer tokens, M vision rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from kimi_mm.errors import UserError
from kimi_mm.processing import IGNORE
from kimi_mm.text.attention import Step
from kimi_mm.text.gqa import GQA
from kimi_mm.text.mla import MLA

if TYPE_CHECKING:
    from kimi_mm.pipeline import KimiMM
    from kimi_mm.vision.processing import VisionItem


@dataclass(frozen=True)
class Attention:
    """`words` of an answer, and for each item the maps [words, h / m, w / m] of its cells; a word's maps sum to one."""

    words: list[str]
    maps: list[np.ndarray]


@torch.inference_mode()
def attention_over_items(engine: KimiMM, items: list[VisionItem], question: str, answer: str) -> Attention:
    """Returns how the words of an answer attend to the cells of pictures and chunks.

    Raises:
        UserError: the answer is empty, or no layer of the backbone has attention weights.
    """
    processor = engine.processor
    streams = processor.question(items, question, answer)
    asking = [i for i, label in enumerate(streams.text_labels) if label != IGNORE][:-1]  # without text_eos
    if not asking:
        raise UserError("the answer is empty, there is nothing to explain.")
    inputs = engine.question_inputs(items, question, answer)
    assert inputs.vision_at is not None
    weights: list[torch.Tensor] = []

    def watch(module: MLA | GQA, args: tuple) -> None:
        q, k = _queries_keys(module, args[0], args[1])
        scores = torch.einsum("ahe,the->hat", q[asking], k) * module.scale
        later = torch.arange(len(k), device=k.device) > torch.tensor(asking, device=k.device)[:, None]
        weights.append(scores.masked_fill(later, float("-inf")).softmax(-1)[..., inputs.vision_at].mean(0))

    hooks = [m.register_forward_pre_hook(watch) for m in engine.model.backbone.modules() if isinstance(m, (MLA, GQA))]
    try:
        engine.model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not weights:
        raise UserError("no layer of this backbone has attention weights to show.")
    shares = torch.stack(weights).mean(0)
    shares = (shares / shares.sum(-1, keepdim=True)).cpu().numpy()  # [A, M]
    words, owner = _words(engine, streams.text_labels, asking)
    by_word = np.stack([shares[owner == number].mean(0) for number in range(len(words))])
    merge = engine.processor.vision.config.merge_size if engine.processor.vision is not None else 1
    ends = np.cumsum([item.num_tokens for item in items])[:-1]
    maps = [
        part.reshape(len(words), item.grid[1] // merge, item.grid[2] // merge)
        for item, part in zip(items, np.split(by_word, ends, axis=1), strict=True)
    ]
    return Attention(words, maps)


def _queries_keys(module: MLA | GQA, x: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Recomputes what a softmax layer compares: queries and keys [T, H, E] of the only row."""
    T = x.shape[1]
    if isinstance(module, GQA):
        config, (cos, sin) = module.config, module.rope.angles(step.positions)
        q = module.rope.rotate(module.q_proj(x).view(1, T, config.num_heads, -1), cos, sin)
        k = module.rope.rotate(module.k_proj(x).view(1, T, config.num_kv_heads, -1), cos, sin)
        return q[0], k[0].repeat_interleave(config.num_heads // config.num_kv_heads, 1)
    config = module.config
    N, R, L = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    q = module.q_proj(x) if config.q_lora_rank is None else module.q_b_proj(module.q_a_norm(module.q_a_proj(x)))
    q_nope, q_pe = q.view(1, T, config.num_heads, N + R).split([N, R], -1)
    latent, k_pe = module.kv_a_proj(x).split([L, R], -1)
    k_pe = k_pe[:, :, None]
    if module.rope is not None:
        cos, sin = module.rope.angles(step.positions)
        q_pe, k_pe = module.rope.rotate(q_pe, cos, sin), module.rope.rotate(k_pe, cos, sin)
    kv = module.kv_b_proj(module.kv_a_norm(latent)).view(1, T, config.num_heads, -1)
    k = torch.cat([kv[..., :N], k_pe.expand(-1, -1, config.num_heads, -1)], -1)
    return torch.cat([q_nope, q_pe], -1)[0], k[0]


def _words(engine: KimiMM, labels: list[int], asking: list[int]) -> tuple[list[str], np.ndarray]:
    """Returns the words of the answer and, for each of its tokens, the number of its word."""
    ids = [labels[i] for i in asking]
    owner, words = [], engine.processor.tokenizer.decode(ids).split()
    for end in range(1, len(ids) + 1):
        owner.append(len(engine.processor.tokenizer.decode(ids[:end]).split()) - 1)
    return words, np.clip(owner, 0, None)


def draw_attention(
    path: Path, items: list[VisionItem], attention: Attention, title: str, caption: str, most_words: int = 6
) -> None:
    """Draws pictures and, beside them, the attention of the whole answer and of its first words, into a PNG file.

    Args:
        path: written aside and renamed.
        items: what was looked at; the first frame stands for a chunk, and the first four items for all.
        attention: from `attention_over_items`.
        title, caption: above and below.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, words = min(len(items), 4), attention.words[:most_words]
    columns = 2 + (len(words) if len(attention.words) > 1 else 0)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.4 * columns, 2.7 * rows + 0.9), squeeze=False, layout="constrained"
    )
    figure.suptitle(_plain(title), fontsize=11, x=0.01, ha="left", wrap=True)
    figure.supxlabel(_plain(caption), fontsize=9, x=0.01, ha="left", wrap=True)
    for row in range(rows):
        picture, maps = _picture(items[row]), attention.maps[row]
        panels = [("", None), ("whole answer", maps.mean(0))]
        panels += [(word, maps[number]) for number, word in enumerate(words)]
        for axis, (label, heat) in zip(axes[row], panels, strict=False):
            axis.imshow(picture)
            if heat is not None:
                extent = (-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5)
                axis.imshow(heat, extent=extent, cmap="inferno", alpha=0.65, interpolation="bilinear", vmin=0)
            axis.set_xlim(-0.5, items[row].size[1] - 0.5)
            axis.set_ylim(items[row].size[0] - 0.5, -0.5)
            axis.set_title(_plain(label) if row == 0 else "", fontsize=9)
            axis.set_axis_off()
    aside = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(aside, dpi=110, format="png", metadata={"Software": None})
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
        plt.close(figure)


def _picture(item: VisionItem) -> np.ndarray:
    """Puts the patches of the first frame back together: [H, W, 3] in [0, 1], padding included."""
    _, h, w = item.grid
    patches = item.pixel_values[: h * w]
    p = patches.shape[-1]
    image = patches.view(h, w, 3, p, p).permute(0, 3, 1, 4, 2).reshape(h * p, w * p, 3)
    return (image * 0.5 + 0.5).clamp(0, 1).numpy()


def _plain(text: str) -> str:
    """Text that Matplotlib draws as it stands: no formulas, no control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text).replace("$", r"\$")
