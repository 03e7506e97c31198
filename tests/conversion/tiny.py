"""Tiny random models as published: the folders, configs and tensor names of the real ones, written to disk."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from kimi_mm.conversion.configs import model_config
from kimi_mm.conversion.layouts import layout_of

KIMI_AUDIO: dict[str, Any] = {
    "architectures": ["MoonshotKimiaForCausalLM"],
    "model_type": "kimi_audio",
    "vocab_size": 720,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "use_whisper_feature": True,
    "kimia_mimo_layers": 2,
    "kimia_mimo_transformer_from_layer_index": 2,
    "kimia_mimo_audiodelaytokens": 6,
    "kimia_adaptor_input_dim": 64,
    "kimia_token_offset": 400,
    "num_base_tokens": 260,
    "torch_dtype": "bfloat16",
}
GLM = {
    "d_model": 16,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
    "quantize_position": 2,
    "pooling_kernel_size": 4,
    "pooling_type": "avg",
    "pooling_position": 2,
    "quantize_vocab_size": 320,
    "quantize_causal_block_size": 200,
    "encoder_causal_convolution": True,
    "quantize_causal_encoder": False,
}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}
DIT = {
    "model": {
        "dit": {
            "input_size": 80,
            "semantic_vocab_size": 320,
            "hidden_size": 32,
            "depth": 2,
            "num_heads": 2,
            "mlp_ratio": 2,
            "ffn_type": "vanilla_mlp",
            "use_rope": True,
            "rope_params": {"rope_base": 10000},
        }
    },
    "normalize_mel": True,
    "mel_mean": -4.479605,
    "mel_std": 3.4584913,
    "ode_steps": 150,
}
VOCODER = {
    "sampling_rate": 24000,
    "n_fft": 1024,
    "hop_size": 480,
    "num_mels": 80,
    "upsample_rates": [5, 2, 2, 2, 2, 3, 2],
    "upsample_kernel_sizes": [9, 4, 4, 4, 4, 5, 4],
    "upsample_initial_channel": 128,
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
}


def write_vocabulary(folder: Path, extra: int = 4) -> None:
    """256 bytes and a few merges, as `tiktoken.model`."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" a", b"in"][:extra]
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "tiktoken.model").write_text(lines)


def draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * (0.1 if len(shape) > 1 else 0.2)


def kimi_audio(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes a whole Kimi-Audio: LM in two shards, Whisper with decoder, GLM tokenizer, DiT and vocoder as .pt."""
    parts = {"whisper-large-v3": WHISPER, "glm-4-voice-tokenizer": GLM, "audio_detokenizer": DIT, "vocoder": VOCODER}
    config = model_config("kimi_audio", KIMI_AUDIO, parts, folder)
    layout = layout_of("kimi_audio", config)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for ours, pieces in layout.table.items():
        for piece in pieces:
            value = draw(piece.shape, generator)
            if "norm" in piece.name and piece.name.endswith("weight"):
                value += 1
            if ours.endswith("weight_g"):
                value = value.abs() + 0.5
            if piece.group == "glm-4-voice-tokenizer":  # so that sounds differ in their codes
                value *= 8 if piece.name in ("conv1.weight", "embed_positions.weight") else 4
            half = piece.group in ("", "whisper-large-v3")
            tensors.setdefault(piece.group, {})[piece.name] = value.to(dtype) if half else value
    frequencies = (1e6 ** (-torch.arange(0, 8, 2) / 8)).bfloat16()
    for name in [n for n in tensors[""] if n.endswith("q_proj.weight")]:
        tensors[""][name.replace("q_proj.weight", "rotary_emb.inv_freq")] = frequencies.clone()
    tensors["whisper-large-v3"]["model.decoder.layers.0.fc1.weight"] = draw((4, 4), generator).to(dtype)
    tensors["glm-4-voice-tokenizer"] |= {
        "ema_count": torch.ones(320),
        "ema_weight": draw((320, 16), generator),
        "embed_positions2.weight": draw((375, 16), generator),
    }
    for i in range(len([n for n in tensors["vocoder"] if n.endswith(".act.alpha")])):
        stem = sorted(n for n in tensors["vocoder"] if n.endswith(".act.alpha"))[i].removesuffix(".act.alpha")
        for name in ("upsample.filter", "downsample.lowpass.filter"):
            tensors["vocoder"][f"{stem}.{name}"] = draw((1, 1, 12), generator)
    for part, values in parts.items():
        (folder / part).mkdir(parents=True)
        if part == "audio_detokenizer":
            (folder / part / "config.yaml").write_text(yaml.safe_dump(values))
        else:
            (folder / part / "config.json").write_text(json.dumps(values))
    state = tensors["audio_detokenizer"] | {"resampler.kernel": draw((3, 5), generator)}
    torch.save({"state_dict": state}, folder / "audio_detokenizer/model.pt")
    torch.save({"generator": tensors["vocoder"]}, folder / "vocoder/model.pt")
    for part in ("whisper-large-v3", "glm-4-voice-tokenizer"):
        save_file(tensors[part], folder / part / "model.safetensors")
    write_shards(folder, tensors[""])
    (folder / "config.json").write_text(json.dumps(KIMI_AUDIO))
    write_vocabulary(folder)
    return folder


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Two shards and an index, named as Kimi-Audio's are."""
    names = sorted(tensors)
    shards = {"model-1-of-35.safetensors": names[::2], "model-36-of-36.safetensors": names[1::2]}
    index = {}
    for file, chosen in shards.items():
        save_file({name: tensors[name].contiguous() for name in chosen}, folder / file)
        index |= dict.fromkeys(chosen, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


KIMI_LINEAR: dict[str, Any] = {
    "architectures": ["KimiLinearForCausalLM"],
    "model_type": "kimi_linear",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "mla_use_nope": True,
    "linear_attn_config": {
        "full_attn_layers": [4],
        "kda_layers": [1, 2, 3],
        "num_heads": 3,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    },
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_token": 3,
    "num_shared_experts": 1,
    "routed_scaling_factor": 2.446,
    "moe_renormalize": True,
    "num_expert_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 299,
    "pad_token_id": 298,
}


def text_model(folder: Path, values: dict[str, Any], dtype: torch.dtype = torch.bfloat16, int4: bool = False) -> Path:
    """Writes a text model; with `int4` its experts are packed as K2.5's."""
    from kimi_mm.quantized import quantize

    folder.mkdir(parents=True, exist_ok=True)
    layout = "kimi_k25" if values["model_type"] == "kimi_k25" else values["model_type"]
    config = model_config(layout, values, {}, folder)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for pieces in layout_of(layout, config).table.values():
        for piece in pieces:
            value = draw(piece.shape, generator)
            if "norm" in piece.name and piece.name.endswith("weight"):
                value += 1
            exact = piece.name.endswith(("A_log", "dt_bias", "score_correction_bias"))
            if int4 and ".experts." in piece.name:
                packed, scale = quantize(value.to(dtype), "int4")
                shape = torch.tensor(piece.shape, dtype=torch.int32)
                tensors |= {f"{piece.name}_packed": packed, f"{piece.name}_scale": scale, f"{piece.name}_shape": shape}
            else:
                tensors[piece.name] = value if exact else value.to(dtype)
    write_shards(folder, tensors)
    (folder / "config.json").write_text(json.dumps(values))
    write_vocabulary(folder)
    return folder


KIMI_K25: dict[str, Any] = {
    "architectures": ["KimiK25ForConditionalGeneration"],
    "model_type": "kimi_k25",
    "text_config": {
        "model_type": "kimi_k2",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.827,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 64.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "eos_token_id": 299,
        "pad_token_id": 298,
    },
    "vision_config": {
        "patch_size": 14,
        "init_pos_emb_height": 8,
        "init_pos_emb_width": 8,
        "init_pos_emb_time": 4,
        "vt_hidden_size": 32,
        "vt_num_hidden_layers": 2,
        "vt_num_attention_heads": 2,
        "vt_intermediate_size": 48,
        "merge_kernel_size": [2, 2],
        "text_hidden_size": 64,
    },
}
