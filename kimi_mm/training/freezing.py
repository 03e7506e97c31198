"""Which parts of a model learn: whole parts frozen by name, or low-rank adapters in place of the weights (LoRA).

    W x  ─►  W x + (alpha / rank) B A x        W frozen; A [rank, in] and B [out, rank] learn

At the end adapters are merged into W.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kimi_mm.config import ConfigError
from kimi_mm.config_base import Config
from kimi_mm.model import Model
from kimi_mm.text.moe import Router

PARTS = ("audio", "features", "vision", "tower", "projector", "embed", "adaptor", "trunk", "text", "speech")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Config):
    """Low-rank adapters (Hu et al., 2021) beside linear layers of the backbone, by way of peft.

    Args:
        rank, alpha: size of the adapters, and their scale alpha / rank.
        targets: last names of the linear layers that get one.
        dropout: on their inputs.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "kv_a_proj", "kv_b_proj")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0.0 <= self.dropout < 1.0 or not self.targets:
            raise ConfigError("lora: rank and alpha must be above 0, dropout in [0, 1), and targets not empty.")


def parts_of(model: Model) -> dict[str, list[nn.Module]]:
    """Returns the modules of every part that a model has and that `freeze` can name.

    "audio" is the tokenizer without "features", an encoder of its own for continuous features (Kimi-Audio's Whisper);
    "vision" tower and projector together, "embed" the table of ids (and, where it is tied, the heads), "text" and
    "speech" the two branches with their heads.
    """
    backbone, vision = model.backbone, model.vision
    audio = model.audio if model.config.hears else None
    parts = {
        "audio": [audio and audio.encoder, audio and audio.quantizer],
        "features": [audio and audio.feature_encoder],
        "vision": [vision],
        "tower": [vision and vision.tower],
        "projector": [vision and vision.projector],
        "embed": [backbone.embed_tokens],
        "adaptor": [backbone.adaptor],
        "trunk": [backbone.trunk],
        "text": [backbone.text, backbone.lm_head],
        "speech": [backbone.audio, backbone.audio_head],
    }
    found = {name: [module for module in modules if module is not None] for name, modules in parts.items()}
    return {name: modules for name, modules in found.items() if modules}


def freeze(model: Model, names: tuple[str, ...]) -> list[nn.Module]:
    """Makes parts keep their weights; returns their modules, which must stay in eval mode.

    Raises:
        ConfigError: for a part that the model does not have.
    """
    parts = parts_of(model)
    frozen: list[nn.Module] = []
    for name in names:
        if name not in parts:
            raise ConfigError(f"freeze: '{name}' is not a part of this model; it has {', '.join(parts)}.")
        for module in parts[name]:
            module.requires_grad_(False)
            frozen.append(module)
    return frozen


def add_lora(backbone: nn.Module, config: LoraConfig) -> list[nn.Module]:
    """Freezes a backbone and puts adapters beside its linear layers; returns what must stay in eval mode.

    Raises:
        ConfigError: when peft is missing, or no layer has one of the names.
    """
    try:
        import peft
    except ModuleNotFoundError:
        raise ConfigError("lora needs the package peft: pip install 'kimi-mm[lora]'.") from None
    linear = {name.rpartition(".")[2] for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
    if not linear & set(config.targets):
        raise ConfigError(f"lora.targets: no layer has one of these names; there are {', '.join(sorted(linear))}.")
    backbone.requires_grad_(False)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=sorted(linear & set(config.targets)),
    )
    peft.inject_adapter_in_model(settings, backbone)
    for parameter in backbone.parameters():
        if parameter.requires_grad:  # adapters are made in the type of their weights, which may be too narrow to learn
            parameter.data = parameter.data.float()
    # The choice of experts belongs to the frozen weights; balancing must not move it.
    return [module for module in backbone.modules() if isinstance(module, Router)]


def merge_lora(backbone: nn.Module) -> None:
    """Adds all adapters to the weights that they stand beside, in fp32, and removes them.

    Those weights, which were frozen, require gradients now: they are what was learnt.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in list(backbone.named_modules()):
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            assert isinstance(base, nn.Linear)
            base.weight.data = base.weight.data.float()
            module.merge()  # type: ignore[operator]
            base.weight.requires_grad_()
            parent, _, last = name.rpartition(".")
            setattr(backbone.get_submodule(parent), last, base)
