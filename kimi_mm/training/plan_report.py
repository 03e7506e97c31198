"""The tables of `kimi-mm plan`: training on many GPUs, and weights and caches of a model that only runs."""

from __future__ import annotations

from pathlib import Path

from kimi_mm.config import BackboneConfig, ConfigError, ModelConfig
from kimi_mm.conversion.presets import PRESETS, published_preset
from kimi_mm.errors import UserError
from kimi_mm.training.costs import Costs, count
from kimi_mm.training.plan import Plan

FORMATS = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}  # bytes of a number, scales not counted


def find_model(name: str) -> ModelConfig:
    """Reads the config that a recipe, a model file below recipes/models, or a checkpoint folder describes.

    Published models go by preset or repository name (`kimi_mm.conversion.presets`).

    Raises:
        UserError: if there is no such thing.
    """
    from kimi_mm.training.recipe import load_recipe, recipes_root

    if Path(name).is_dir():
        return ModelConfig.from_yaml(Path(name) / "config.yaml")
    models = recipes_root() / "models"
    for candidate in (Path(name), models / name, models / f"{name}.yaml", recipes_root() / f"{name}.yaml"):
        if candidate.is_file():
            text = candidate.read_text(encoding="utf-8")
            return load_recipe(str(candidate))[1] if "\nstage:" in f"\n{text}" else ModelConfig.from_yaml(candidate)
    try:
        return published_preset(name).config
    except ConfigError:
        known = ", ".join([*sorted(path.stem for path in models.glob("*.yaml")), *PRESETS])
        raise UserError(f"model '{name}' not found: neither a folder nor a recipe nor one of {known}.") from None


def describe_size(costs: Costs) -> str:
    """One line on the parameters of a backbone."""
    return f"{costs.total / 1e9:.2f} G parameters, {costs.active / 1e9:.2f} G of them active for a token"


def training_table(plans: list[Plan]) -> str:
    """A Markdown table with a row for each plan."""
    head = ("GPUs", "expert", "context", "rows x tokens", "micro-batches", "tokens a step", "GB a GPU", "fits")
    head += ("GB sent", "exposed", "optimizer", "tokens/s a GPU", "MFU")
    rows = []
    for plan in plans:
        layout, seconds = plan.layout, plan.step_seconds
        bare = sum(plan.seconds[name] for name in ("fsdp", "expert", "context")) / seconds
        rows.append(
            (
                str(layout.gpus),
                str(layout.expert),
                str(layout.context),
                f"{layout.rows} x {layout.tokens}",
                str(layout.micro_batches),
                f"{layout.step_tokens / 1e6:.2f} M",
                f"{plan.memory.total / 1e9:.0f}",
                "yes" if plan.fits else "no",
                f"{sum(plan.sent.values()) / 1e9:.0f}",
                f"{100 * bare:.0f} %",
                f"{100 * plan.seconds['optimizer'] / seconds:.1f} %",
                f"{plan.tokens_per_second:,.0f}",
                f"{100 * plan.mfu:.0f} %",
            )
        )
    return _table(head, rows)


def memory_table(plans: list[Plan]) -> str:
    """A Markdown table of where the memory of a GPU goes, in GB."""
    parts = ("weights", "gradients", "optimizer", "gathered", "activations")
    rows = []
    for plan in plans:
        sizes = [*(getattr(plan.memory, part) for part in parts), plan.memory.total]
        rows.append((str(plan.layout.gpus), *(f"{size / 1e9:.1f}" for size in sizes)))
    return _table(("GPUs", *parts, "in all"), rows)


def inference_table(config: BackboneConfig, contexts: tuple[int, ...] = (4096, 131_072, 1_048_576)) -> str:
    """A Markdown table of the weights in each format, and of a sequence's cache by its length, in GB."""
    costs, (fixed, per_token) = count(config), cache_bytes(config)
    rows = [(f"weights, {name}", f"{costs.total * size / 1e9:.2f}") for name, size in FORMATS.items()]
    rows += [(f"cache of {tokens} tokens", f"{(fixed + per_token * tokens) / 1e9:.3f}") for tokens in contexts]
    return _table(("what", "GB"), rows)


def cache_bytes(config: BackboneConfig) -> tuple[int, int]:
    """Bytes of a sequence's cache: what it takes at any length (KDA), and for each token (MLA, GQA; bf16)."""
    fixed = per_token = 0
    for kind in (*config.trunk, *config.text_branch, *config.audio_branch):
        mixer = kind.partition("/")[0]
        if mixer == "kda" and config.kda is not None:
            c = config.kda
            channels = 2 * c.num_heads * c.head_dim + c.value_heads * c.value_dim
            fixed += 4 * c.value_heads * c.head_dim * c.value_dim + 2 * channels * (c.conv_kernel_size - 1)
        elif mixer == "mla" and config.mla is not None:
            per_token += 2 * (config.mla.kv_lora_rank + config.mla.qk_rope_head_dim)
        elif config.gqa is not None:
            per_token += 2 * 2 * config.gqa.num_kv_heads * config.gqa.head_dim
    return fixed, per_token


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [" | ".join(cells) for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join(f"| {line} |" for line in lines)
