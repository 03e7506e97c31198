"""What is compared: questions, each with arms that differ in one thing, at three scales.

    scale ─► base model, data sizes, steps       question ─► arms ─► phases: recipe and overrides, in turn

Arms of a question have the same number of parameters (to a percent, by the width of their MLPs), take the same number
of tokens, and start from the same seeds. Arms of two questions that are the same run are trained once.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kimi_mm.config import BackboneConfig
from kimi_mm.text.backbone import Backbone

LAYERS = ("kda", "kda", "kda", "mla")  # 3 to 1, as published


@dataclass(frozen=True)
class Scale:
    """Sizes of an ablation. `rates` are the learning rates that each optimiser is tried at."""

    backbone: dict[str, Any]
    layers: int
    text_tokens: int
    row_tokens: int
    batch_rows: int
    steps: int
    rates: tuple[float, ...]
    log_every: int
    held_out_batches: int
    tower: dict[str, Any]
    max_patches: int
    pictures: int  # to learn from; a tenth as many are held out
    fine_tuning: int  # steps
    cuda_graphs: bool = False
    precision: str = "fp32"

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_rows * self.row_tokens

    @property
    def positions(self) -> int:
        """Positions of a batch of documents, which a long conversation has to fit into."""
        return max(1024, self.batch_rows * self.row_tokens)


def _kda(heads: int, size: int) -> dict[str, Any]:
    return {"num_heads": heads, "head_dim": size, "gate": "bounded"}


def _mla(heads: int, size: int, rank: int) -> dict[str, Any]:
    sizes = {"num_heads": heads, "kv_lora_rank": rank, "qk_nope_head_dim": size, "v_head_dim": size}
    return {**sizes, "qk_rope_head_dim": size // 2, "rope": {"theta": 10000.0}}


def _tower(size: int, layers: int, heads: int, side: int) -> dict[str, Any]:
    sizes = {"hidden_size": size, "num_layers": layers, "num_heads": heads, "intermediate_size": 4 * size}
    return {**sizes, "position_height": side, "position_width": side}


SCALES = {
    "debug": Scale(
        backbone={"hidden_size": 32, "intermediate_size": 64, "kda": _kda(2, 16), "mla": _mla(2, 16, 16)},
        layers=4,
        text_tokens=384,
        row_tokens=32,
        batch_rows=2,
        steps=6,
        rates=(2e-3,),
        log_every=1,
        held_out_batches=2,
        tower=_tower(32, 1, 2, 8),
        max_patches=64,
        pictures=20,
        fine_tuning=4,
    ),
    "cpu": Scale(
        backbone={"hidden_size": 96, "intermediate_size": 256, "kda": _kda(3, 32), "mla": _mla(3, 32, 48)},
        layers=8,
        text_tokens=2032,
        row_tokens=64,
        batch_rows=16,
        steps=240,
        rates=(2e-3,),
        log_every=10,
        held_out_batches=24,
        tower=_tower(64, 2, 2, 16),
        max_patches=160,
        pictures=1000,
        fine_tuning=120,
    ),
    "nano": Scale(
        backbone={"hidden_size": 320, "intermediate_size": 1024, "kda": _kda(5, 64), "mla": _mla(5, 64, 128)},
        layers=12,
        text_tokens=4080,
        row_tokens=256,
        batch_rows=64,
        steps=1500,
        rates=(1e-3, 2e-3, 4e-3),
        log_every=20,
        held_out_batches=16,
        tower=_tower(192, 8, 3, 32),
        max_patches=256,
        pictures=20_000,
        fine_tuning=600,
        cuda_graphs=True,
        precision="bf16",
    ),
}


@dataclass(frozen=True)
class Phase:
    """A run of a recipe with overrides; "DATA" in them stands for the folder of the data that all runs share."""

    recipe: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Arm:
    """One way of doing it.

    Args:
        name: in tables.
        model: the model file, as plain values.
        phases: runs, each from the weights of the one before.
        measures: what is scored at the end, see `benchmarks.ablation_scores`; the first one decides.
        after: the arm whose result, with the same seed, it starts from.
    """

    name: str
    model: dict[str, Any]
    phases: tuple[Phase, ...]
    measures: tuple[str, ...] = ("text loss",)
    after: Arm | None = None

    def key(self, seed: int) -> str:
        """Returns a short name of the run that is the same for equal runs."""
        before = "" if self.after is None else self.after.key(seed)
        steps = [[phase.recipe, *phase.overrides] for phase in self.phases]
        content = json.dumps([self.model, steps, self.measures, before, seed], sort_keys=True)
        return f"{self.phases[0].recipe.partition('/')[0]}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Question:
    """Arms, of which the first is what this project does and the others are compared with it."""

    title: str
    arms: Callable[[Scale], list[Arm]]
    note: str = field(default="")


def text_model(scale: Scale, *, layers: tuple[str, ...] = LAYERS, residual: str = "attn_res") -> dict[str, Any]:
    """Returns a model file: a text backbone of dense layers, with tiny ears that do not take part."""
    kinds = [f"{layers[i % len(layers)]}/dense" for i in range(scale.layers)]
    codes = 64
    return {
        "name": "ablation",
        "audio": {
            "mel": {"num_mel_bins": 80, "dynamic_range": "running"},
            "encoder": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "block_size": 100},
            "quantizer": {
                "codebook_size": codes,
                "codebook_dim": 8,
                "hidden_layers": 1,
                "hidden_size": 32,
                "num_heads": 2,
            },
        },
        "backbone": {
            "vocab_size": scale.text_tokens + 16 + codes,
            "tie_word_embeddings": True,
            "residual": residual,
            "attn_res_block_size": 4,
            "trunk": kinds,
            "text_branch": [],
            **scale.backbone,
        },
        "vocab": {"num_text_tokens": scale.text_tokens, "num_audio_codes": codes},
    }


def parameters(model: dict[str, Any]) -> int:
    """Counts the parameters of a model file's backbone."""
    return _count(json.dumps(model["backbone"]))


@functools.cache
def _count(backbone: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Backbone(BackboneConfig.from_dict(json.loads(backbone))).parameters())


def matched(model: dict[str, Any], goal: int) -> dict[str, Any]:
    """Changes the width of the MLPs, in steps of 8, so that the parameters come nearest to `goal`."""

    def widened(width: int) -> dict[str, Any]:
        return {**model, "backbone": {**model["backbone"], "intermediate_size": width}}

    low = parameters(widened(8))
    slope = (parameters(widened(16)) - low) / 8
    middle = round((goal - low) / slope / 8) * 8 + 8
    return min((widened(w) for w in (middle - 8, middle, middle + 8) if w > 0), key=lambda m: abs(parameters(m) - goal))


def _common(scale: Scale, steps: int) -> tuple[str, ...]:
    return (
        f"steps={steps}",
        f"save_every={max(1, steps // 4)}",
        f"log_every={scale.log_every}",
        f"precision={scale.precision}",
        "weights=fp32",
        "label_smoothing=0.0",
    )


def _optim(steps: int, rate: float, optimizer: str = "adamw", decay: float = 0.3) -> str:
    """Overrides of warm-up, a flat part and a decay over the share `decay` of the steps."""
    rest = f"weight_decay: 0.1, betas: [0.9, 0.95], schedule: wsd, decay_fraction: {decay}"
    return f"optim={{optimizer: {optimizer}, lr: {rate}, warmup_steps: {max(1, steps // 20)}, {rest}}}"


def _text(scale: Scale, optimizer: str, rate: float) -> tuple[Phase, ...]:
    overrides = (
        *_common(scale, scale.steps),
        f"cuda_graphs={str(scale.cuda_graphs).lower()}",
        "text.path=DATA/texts.jsonl.gz",
        f"text.row_tokens={scale.row_tokens}",
        f"text.batch_rows={scale.batch_rows}",
        _optim(scale.steps, rate, optimizer),
    )
    return (Phase("text/nano", overrides),)


def _residual(scale: Scale) -> list[Arm]:
    settings = _text(scale, "adamw", scale.rates[0])
    block, plain = text_model(scale), text_model(scale, residual="plain")
    return [
        Arm("Block AttnRes", block, settings),
        Arm("plain residual", matched(plain, parameters(block)), settings),
    ]


def _mixers(scale: Scale) -> list[Arm]:
    settings = _text(scale, "adamw", scale.rates[0])
    mixed = text_model(scale)
    return [
        Arm("KDA and MLA, 3 to 1", mixed, settings),
        Arm("all MLA", matched(text_model(scale, layers=("mla",)), parameters(mixed)), settings),
    ]


def _optimizers(scale: Scale) -> list[Arm]:
    model = text_model(scale)
    return [
        Arm(f"{name}, rate {rate:g}", model, _text(scale, key, rate))
        for name, key in (("MuonClip", "muonclip"), ("AdamW", "adamw"))
        for rate in scale.rates
    ]


VISION_SHARE = 0.1
LATE = 5  # late fusion sees pictures in the last fifth of the steps only


def seeing_model(scale: Scale) -> dict[str, Any]:
    """Returns the model file of `text_model`, with eyes."""
    size = scale.backbone["hidden_size"]
    rules = {"max_patches": scale.max_patches, "max_patches_per_frame": scale.max_patches}
    return {**text_model(scale), "vision": {"input": rules, "tower": scale.tower, "output_size": size}}


def _fusion_phase(scale: Scale, steps: int, share: float, decay: float) -> Phase:
    text = "{name: text, layout: document, files: [DATA/documents.jsonl]}"
    captions = "{name: caption, layout: image_to_text, files: [DATA/captions.jsonl]}"
    overrides = (
        *_common(scale, steps),
        f"data.sources=[{text}, {captions}]" if share else f"data.sources=[{text}]",
        f"data.vision_share={share}",
        f"data.batch_positions={scale.positions}",
        _optim(steps, scale.rates[0], decay=decay),
    )
    return Phase("pretrain/nano", overrides)


def _fusion(scale: Scale) -> list[Arm]:
    last = max(1, scale.steps // LATE)
    model, measures, first = seeing_model(scale), ("caption loss", "text loss"), scale.steps - last
    late = min(0.9, VISION_SHARE * scale.steps / last)
    phases = {
        "early: a tenth from the first step": [(first, VISION_SHARE, 0.0), (last, VISION_SHARE, 0.8)],
        "late: half of the last fifth": [(first, 0.0, 0.0), (last, late, 0.8)],
    }
    return [
        Arm(name, model, tuple(_fusion_phase(scale, *values) for values in parts), measures)
        for name, parts in phases.items()
    ]


def _fine_tuning(scale: Scale) -> list[Arm]:
    base, steps = _fusion(scale)[0], scale.fine_tuning
    asked = ("accuracy", "accuracy by programs")
    arms = []
    for name, file in (
        ("zero-vision: programs", "programs"),
        ("images", "asked"),
        ("text without programs", "guesses"),
    ):
        overrides = (
            *_common(scale, steps),
            f"data.sources=[{{files: [DATA/{file}.jsonl]}}]",
            f"data.batch_positions={scale.positions}",
            "freeze=[embed]",
            _optim(steps, scale.rates[0] / 4, decay=0.8),
        )
        measures = asked[::-1] if file == "programs" else asked[:1]
        arms.append(Arm(name, base.model, (Phase("sft/nano-zero-vision", overrides),), measures, base))
    return arms


QUESTIONS = {
    "residual": Question("Block AttnRes against a plain residual stream", _residual),
    "mixers": Question("KDA and MLA against MLA alone", _mixers),
    "optimizer": Question("MuonClip against AdamW", _optimizers),
    "fusion": Question(
        "Early against late fusion of pictures",
        _fusion,
        "The same positions with pictures in both; both take up a fresh optimiser where the last fifth begins.",
    ),
    "sft": Question(
        "Zero-vision, image and text-only fine-tuning",
        _fine_tuning,
        "All from the model of early fusion. The first arm answers by programs, and is scored without them too.",
    ),
}
