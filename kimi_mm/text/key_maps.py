"""Published decoders as our backbone: configs and state dicts of transformers' layouts, both ways.

    kimi_linear   KDA and MLA layers, MoE, plain residual        (transformers 5.23 layout, merged experts)
    deepseek_v3   MLA with rotary positions, MoE                 (also the text model of Kimi K2)
    qwen2         GQA, dense MLPs

A key map is a list of name pairs; the tensors are the same up to dimensions of size one, so one table serves reading
and writing. Layer i of theirs is layer i of our trunk, or of the text branch behind it when the trunk is shorter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kimi_mm.config import BackboneConfig, GQAConfig, KDAConfig, MLAConfig, MoEConfig, RopeConfig
from kimi_mm.errors import CheckpointError

MODEL_TYPES = ("kimi_linear", "deepseek_v3", "qwen2")

_TOP = {
    "model.embed_tokens.weight": "embed_tokens.weight",
    "model.norm.weight": "text.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_LAYER = {
    "input_layernorm.weight": "mixer_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    "self_attn.q_proj.weight": "mixer.q_proj.weight",
    "self_attn.k_proj.weight": "mixer.k_proj.weight",
    "self_attn.v_proj.weight": "mixer.v_proj.weight",
    "self_attn.o_proj.weight": "mixer.o_proj.weight",
    "self_attn.q_proj.bias": "mixer.q_proj.bias",
    "self_attn.k_proj.bias": "mixer.k_proj.bias",
    "self_attn.v_proj.bias": "mixer.v_proj.bias",
    "self_attn.q_a_proj.weight": "mixer.q_a_proj.weight",
    "self_attn.q_a_layernorm.weight": "mixer.q_a_norm.weight",
    "self_attn.q_b_proj.weight": "mixer.q_b_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "mixer.kv_a_proj.weight",
    "self_attn.kv_a_layernorm.weight": "mixer.kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "mixer.kv_b_proj.weight",
    "self_attn.conv1d.weight": "mixer.conv_weight",
    "self_attn.forget_gate.f_a_proj.weight": "mixer.f_a_proj.weight",
    "self_attn.forget_gate.f_b_proj.weight": "mixer.f_b_proj.weight",
    "self_attn.forget_gate.A_log": "mixer.A_log",
    "self_attn.forget_gate.dt_bias": "mixer.dt_bias",
    "self_attn.b_proj.weight": "mixer.b_proj.weight",
    "self_attn.g_a_proj.weight": "mixer.g_a_proj.weight",
    "self_attn.g_b_proj.weight": "mixer.g_b_proj.weight",
    "self_attn.o_norm.weight": "mixer.o_norm_weight",
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.e_score_correction_bias": "mlp.router.bias",
    "mlp.experts.gate_up_proj": "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj": "mlp.experts.down_proj",
    "mlp.shared_experts.gate_proj.weight": "mlp.shared_experts.gate_proj.weight",
    "mlp.shared_experts.up_proj.weight": "mlp.shared_experts.up_proj.weight",
    "mlp.shared_experts.down_proj.weight": "mlp.shared_experts.down_proj.weight",
}
_TOP_BACK = {ours: theirs for theirs, ours in _TOP.items()}
_LAYER_BACK = {ours: theirs for theirs, ours in _LAYER.items()}


def from_transformers(state: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, Tensor]:
    """Renames a transformers state dict to ours.

    Args:
        state: tensors of a `*ForCausalLM` of one of `MODEL_TYPES`.
        config: the backbone that will load the result; decides which layers belong to the trunk, and drops a tied head.

    Returns:
        State dict for `Backbone.load_state_dict`.

    Raises:
        CheckpointError: on a key that none of the layouts has.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", key)
        name = _LAYER.get(match[2]) if match else _TOP.get(key)
        if name is None:
            raise CheckpointError(f"'{key}' belongs to none of the known layouts ({', '.join(MODEL_TYPES)}).")
        if name == "mixer.conv_weight":
            tensor = tensor.squeeze(1)
        elif name == "mixer.A_log":
            tensor = tensor.flatten()
        renamed[_place(int(match[1]), config) + name if match else name] = tensor
    return renamed


def to_transformers(state: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, Tensor]:
    """Inverse of `from_transformers`, for a backbone with a plain residual stream and no audio parts.

    Raises:
        CheckpointError: on a tensor that the published layouts have no place for.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"(trunk|text\.layers)\.(\d+)\.(.+)", key)
        name = _LAYER_BACK.get(match[3]) if match else _TOP_BACK.get(key)
        if name is None:
            raise CheckpointError(f"'{key}' has no counterpart in the layouts of {', '.join(MODEL_TYPES)}.")
        if name.endswith("conv1d.weight"):
            tensor = tensor.unsqueeze(1)
        elif name.endswith("A_log"):
            tensor = tensor.view(1, 1, -1, 1)
        offset = len(config.trunk) if match and match[1] != "trunk" else 0
        renamed[f"model.layers.{int(match[2]) + offset}.{name}" if match else name] = tensor
    return renamed


def backbone_config(model_type: str, values: Mapping[str, Any]) -> BackboneConfig:
    """Translates the `config.json` values of a published model, as `PretrainedConfig.to_dict()` gives them.

    Raises:
        CheckpointError: on a model type or a feature that the backbone does not have.
    """
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"model_type '{model_type}' is not one of {', '.join(MODEL_TYPES)}.")
    if values.get("hidden_act", "silu") != "silu" or values.get("attention_bias"):
        raise CheckpointError("Only SiLU and attention without biases are supported for this model type.")
    layers = int(values["num_hidden_layers"])
    common: dict[str, Any] = {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "rms_norm_eps": values["rms_norm_eps"],
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", False)),
        "residual": "plain",
    }
    if model_type == "qwen2":
        heads = values["num_attention_heads"]
        gqa = GQAConfig(
            num_heads=heads,
            num_kv_heads=values["num_key_value_heads"],
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            rope=_rope(values, interleaved=False),
        )
        return BackboneConfig(trunk=("gqa/dense",) * layers, gqa=gqa, **common)
    rope = _rope(values, bool(values.get("rope_interleave", True))) if model_type == "deepseek_v3" else None
    mla = MLAConfig(
        num_heads=values["num_attention_heads"],
        q_lora_rank=values["q_lora_rank"],
        kv_lora_rank=values["kv_lora_rank"],
        qk_nope_head_dim=values["qk_nope_head_dim"],
        qk_rope_head_dim=values["qk_rope_head_dim"],
        v_head_dim=values["v_head_dim"],
        rope=rope,
    )
    moe = MoEConfig(
        num_experts=_either(values, "num_local_experts", "n_routed_experts", "num_experts"),
        num_experts_per_token=_either(values, "num_experts_per_tok", "num_experts_per_token"),
        intermediate_size=values["moe_intermediate_size"],
        num_shared_experts=_either(values, "n_shared_experts", "num_shared_experts"),
        routed_scaling_factor=values["routed_scaling_factor"],
        normalize_weights=bool(_either(values, "norm_topk_prob", "moe_renormalize")),
        num_groups=_either(values, "n_group", "num_expert_group"),
        top_groups=values["topk_group"],
    )
    if model_type == "deepseek_v3":
        dense = values["first_k_dense_replace"]
        trunk = tuple("mla/dense" if i < dense else "mla/moe" for i in range(layers))
        return BackboneConfig(trunk=trunk, mla=mla, moe=moe, **common)
    kda = KDAConfig(
        num_heads=values["linear_num_heads"],
        head_dim=values["linear_head_dim"],
        conv_kernel_size=values["linear_conv_kernel_dim"],
        gate="softplus",
    )
    mixers = ("kda" if kind == "linear_attention" else "mla" for kind in values["layer_types"])
    mlps = ("moe" if kind == "sparse" else "dense" for kind in values["mlp_layer_types"])
    trunk = tuple(f"{mixer}/{mlp}" for mixer, mlp in zip(mixers, mlps, strict=True))
    return BackboneConfig(trunk=trunk, kda=kda, mla=mla, moe=moe, **common)


def _place(layer: int, config: BackboneConfig) -> str:
    trunk = len(config.trunk)
    return f"trunk.{layer}." if layer < trunk else f"text.layers.{layer - trunk}."


def _rope(values: Mapping[str, Any], interleaved: bool) -> RopeConfig:
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = float(given.get("rope_theta") or values.get("rope_theta") or 10_000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta, interleaved=interleaved)
    if kind != "yarn":
        raise CheckpointError(f"Rotary type '{kind}' is not supported, only 'default' and 'yarn'.")
    return RopeConfig(
        theta=theta,
        interleaved=interleaved,
        yarn_factor=float(given["factor"]),
        yarn_original_positions=int(given["original_max_position_embeddings"]),
        yarn_beta_fast=float(given.get("beta_fast") or 32.0),
        yarn_beta_slow=float(given.get("beta_slow") or 1.0),
        yarn_mscale=float(given.get("mscale") or 1.0),
        yarn_mscale_all_dim=float(given.get("mscale_all_dim") or 0.0),
    )


def _either(values: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if name in values:
            return values[name]
    raise CheckpointError(f"config.json lacks '{names[0]}'.")
