"""`config.json` of published models as `ModelConfig`; what it leaves open comes from the presets.

model_type  kimi_linear | deepseek_v3, kimi_k2 | qwen2 | kimi_k25 | kimi_vl | kimi_audio, moonshot_kimia
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kimi_mm.audio.detokenizer_config import (
    BigVGANConfig,
    DetokenizerConfig,
    DiTConfig,
    StreamingConfig,
    TargetMelConfig,
)
from kimi_mm.config import (
    AudioEncoderConfig,
    AudioTokenizerConfig,
    BackboneConfig,
    ConfigError,
    GQAConfig,
    MelConfig,
    ModelConfig,
    QuantizerConfig,
    RopeConfig,
    VisionConfig,
    VocabConfig,
)
from kimi_mm.conversion.layouts import DIT, GLM, VOCODER, WHISPER
from kimi_mm.conversion.presets import K2_VOCAB, KIMI_AUDIO_VOCAB
from kimi_mm.errors import CheckpointError
from kimi_mm.text.key_maps import backbone_config
from kimi_mm.vision.key_maps import vision_config

_TYPES = {
    "kimi_linear": "kimi_linear",
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "qwen2": "qwen2",
    "kimi_k25": "kimi_k25",
    "kimi_vl": "kimi_vl",
    "kimi_audio": "kimi_audio",
    "moonshot_kimia": "kimi_audio",
}


def layout_name(values: Mapping[str, Any], where: Path) -> str:
    """Returns the layout of a published model.

    Raises:
        CheckpointError: on an architecture that is not known here.
    """
    kind = values.get("model_type")
    if kind not in _TYPES:
        named = (values.get("architectures") or ["?"])[0]
        raise CheckpointError(
            f"{where}: architecture {named} (model_type '{kind}') is not supported; known: {', '.join(_TYPES)}."
        )
    return _TYPES[kind]


def model_config(
    layout: str, values: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]], where: Path
) -> ModelConfig:
    """Translates published configs.

    Args:
        layout: of `layout_name`.
        values: of the root's config.json.
        parts: for Kimi-Audio, the configs of the folders that are there.
        where: path of config.json, for messages.

    Raises:
        CheckpointError: on a missing key or an unsupported feature; names both file and key.
    """
    try:
        if layout == "kimi_audio":
            return _kimi_audio(values, parts)
        text = values.get("text_config", values) if layout in ("kimi_k25", "kimi_vl") else values
        kind = "deepseek_v3" if layout in ("kimi_k25", "kimi_vl") else layout
        backbone = _text(kind, text)
        vision: VisionConfig | None = None
        if layout in ("kimi_k25", "kimi_vl"):
            vision = vision_config(values).replace(output_size=backbone.hidden_size)
        return ModelConfig(
            name=layout.replace("_", "-"),
            hears=False,
            vision=vision,
            backbone=backbone,
            vocab=_text_vocab(backbone.vocab_size, text),
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: lacks {error}.") from None
    except (CheckpointError, ConfigError) as error:
        message = str(error)
        raise CheckpointError(message if str(where) in message else f"{where}: {message}") from None


def _text(kind: str, values: Mapping[str, Any]) -> BackboneConfig:
    """Brings published names to those of transformers, which `backbone_config` reads."""
    values = dict(values)
    linear = values.get("linear_attn_config")
    if kind == "kimi_linear" and linear is not None:
        count = values["num_hidden_layers"]
        kda, full = set(linear["kda_layers"]), set(linear["full_attn_layers"])
        if kda | full != set(range(1, count + 1)) or kda & full:
            raise CheckpointError("linear_attn_config: kda_layers and full_attn_layers must share out all layers.")
        dense, every = values["first_k_dense_replace"], values.get("moe_layer_freq", 1)
        values |= {
            "linear_num_heads": linear["num_heads"],
            "linear_head_dim": linear["head_dim"],
            "linear_conv_kernel_dim": linear["short_conv_kernel_size"],
            "layer_types": ["linear_attention" if i in kda else "full_attention" for i in range(1, count + 1)],
            "mlp_layer_types": ["sparse" if i >= dense and i % every == 0 else "dense" for i in range(count)],
        }
    backbone = backbone_config(kind, values)
    if kind == "kimi_linear" and linear is not None and backbone.mla is not None:
        # The published code normalises latents with the model's eps, transformers' with its own default.
        backbone = backbone.replace(mla=backbone.mla.replace(kv_norm_eps=values["rms_norm_eps"]))
    return backbone


def _text_vocab(size: int, values: Mapping[str, Any]) -> VocabConfig:
    if size == K2_VOCAB.size:
        return K2_VOCAB
    eos = values.get("eos_token_id")
    eos = eos[0] if isinstance(eos, (list, tuple)) else eos
    eos = min(size - 1, eos if eos is not None else size - 1)
    ids = {"pad": min(size - 1, values.get("pad_token_id") or 0), "msg_end": eos, "text_eos": eos, "text_blank": eos}
    return VocabConfig(num_text_tokens=size, num_audio_codes=0, audio_start=size, special_ids=ids)


# ---- Kimi-Audio ------------------------------------------------------------------------------------------------


def _kimi_audio(values: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> ModelConfig:
    layers, branch = values["num_hidden_layers"], values["kimia_mimo_layers"]
    trunk = values["kimia_mimo_transformer_from_layer_index"] + 1
    heads = values["num_attention_heads"]
    glm, whisper = parts[GLM], parts[WHISPER]
    encoder = AudioEncoderConfig(
        hidden_size=glm["d_model"],
        num_layers=glm["quantize_position"],
        num_heads=glm["encoder_attention_heads"],
        intermediate_size=glm["encoder_ffn_dim"],
        max_positions=glm["max_source_positions"],
        causal_convolution=glm["quantize_causal_encoder"] or glm["encoder_causal_convolution"],
        block_size=glm["quantize_causal_block_size"],
        final_norm=False,
        learned_positions=True,
    )
    if glm["pooling_type"] != "avg" or glm["pooling_position"] != glm["quantize_position"]:
        raise CheckpointError("the tokenizer must pool by averages right before it quantizes.")
    audio = AudioTokenizerConfig(
        mel=MelConfig(num_mel_bins=glm["num_mel_bins"], dynamic_range="clip"),
        encoder=encoder,
        feature_encoder=AudioEncoderConfig(
            hidden_size=whisper["d_model"],
            num_layers=whisper["encoder_layers"],
            num_heads=whisper["encoder_attention_heads"],
            intermediate_size=whisper["encoder_ffn_dim"],
            max_positions=whisper["max_source_positions"],
            causal_convolution=False,
            block_size=None,
            learned_positions=True,
        ),
        quantizer=QuantizerConfig(
            codebook_size=glm["quantize_vocab_size"], codebook_dim=glm["d_model"], hidden_layers=0
        ),
        pooling=glm["pooling_kernel_size"],
    )
    start = values["kimia_token_offset"]
    vocab = KIMI_AUDIO_VOCAB
    if (values["vocab_size"], start) != (vocab.size, vocab.audio_offset):
        vocab = _moved(vocab, values)
    return ModelConfig(
        name="kimi-audio-7b",
        audio=audio,
        backbone=BackboneConfig(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            trunk=("gqa/dense",) * trunk,
            text_branch=("gqa/dense",) * (layers - trunk),
            audio_branch=("gqa/dense",) * branch,
            audio_head=True,
            intermediate_size=values["intermediate_size"],
            rms_norm_eps=values["rms_norm_eps"],
            residual="plain",
            adaptor_input_size=values["kimia_adaptor_input_dim"] if values.get("use_whisper_feature", True) else None,
            gqa=GQAConfig(
                num_heads=heads,
                num_kv_heads=values["num_key_value_heads"],
                head_dim=values.get("head_dim") or values["hidden_size"] // heads,
                rope=RopeConfig(theta=float(values["rope_theta"])),
            ),
        ),
        detokenizer=_detokenizer(parts[DIT], parts[VOCODER]) if DIT in parts else None,
        vocab=vocab,
        audio_delay=values["kimia_mimo_audiodelaytokens"],
    )


def _moved(vocab: VocabConfig, values: Mapping[str, Any]) -> VocabConfig:
    """The vocabulary of a model of another size: specials keep their distance from the first one."""
    base, start = values.get("num_base_tokens", vocab.num_text_tokens), values["kimia_token_offset"]
    ids = {name: base + number - vocab.num_text_tokens for name, number in vocab.specials.items()}
    ids["pad"] = start - 1
    if start <= max(ids.values()) - 1 or values["vocab_size"] <= start:
        raise CheckpointError(f"kimia_token_offset={start} leaves no room for the special tokens from {base} on.")
    codes = values["vocab_size"] - start
    return VocabConfig(num_text_tokens=base, num_audio_codes=codes, audio_start=start, special_ids=ids)


def _detokenizer(dit_file: Mapping[str, Any], vocoder: Mapping[str, Any]) -> DetokenizerConfig:
    dit, rates = dit_file["model"]["dit"], tuple(vocoder["upsample_rates"])
    if dit.get("ffn_type", "vanilla_mlp") != "vanilla_mlp" or not dit.get("use_rope", True):
        raise CheckpointError(f"{DIT}/config.yaml: only ffn_type 'vanilla_mlp' with use_rope is supported.")
    mel = TargetMelConfig(
        sample_rate=vocoder["sampling_rate"],
        n_fft=vocoder["n_fft"],
        hop_length=vocoder["hop_size"],
        num_mel_bins=vocoder["num_mels"],
        mean=float(dit_file.get("mel_mean", TargetMelConfig().mean)),
        std=float(dit_file.get("mel_std", TargetMelConfig().std)),
    )
    return DetokenizerConfig(
        mel=mel,
        dit=DiTConfig(
            hidden_size=dit["hidden_size"],
            num_layers=dit["depth"],
            num_heads=dit["num_heads"],
            intermediate_size=int(dit["hidden_size"] * dit["mlp_ratio"]),
            codebook_size=dit["semantic_vocab_size"],
            rope_theta=float(dit.get("rope_params", {}).get("rope_base", 10_000.0)),
        ),
        bigvgan=BigVGANConfig(
            upsample_rates=rates,
            upsample_kernels=tuple(vocoder["upsample_kernel_sizes"]),
            initial_channels=vocoder["upsample_initial_channel"],
            resblock_kernels=tuple(vocoder["resblock_kernel_sizes"]),
            resblock_dilations=tuple(vocoder["resblock_dilation_sizes"][0]),
        ),
        streaming=StreamingConfig(),
    )


def without(config: ModelConfig, *, voice: bool = False, audio_branch: bool = False) -> ModelConfig:
    """Returns the config without parts that text-only work does not need: what is not there is not loaded.

    Args:
        voice: drop the detokenizer.
        audio_branch: drop the layers and the head that speak, and the detokenizer.
    """
    changes: dict[str, Any] = {}
    if voice or audio_branch:
        changes["detokenizer"] = None
    if audio_branch:
        changes["backbone"] = replace(config.backbone, audio_branch=(), audio_head=False)
    return config.replace(**changes) if changes else config
