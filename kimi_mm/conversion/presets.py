"""Published models by name: whole configs, and the layout of the files they come in.

| name                | parameters      | layout      | published as                                        |
|---------------------|-----------------|-------------|-----------------------------------------------------|
| kimi-linear-48b-a3b | 49.1 G          | kimi_linear | moonshotai/Kimi-Linear-48B-A3B-Base, -Instruct      |
| kimi-audio-7b       | 9.8 G + codecs  | kimi_audio  | moonshotai/Kimi-Audio-7B, -Instruct                 |
| kimi-k2.5           | 1.03 T + 0.47 G | kimi_k25    | moonshotai/Kimi-K2.5 (experts in INT4)              |
| kimi-vl-a3b         | 16 G + 0.45 G   | kimi_vl     | moonshotai/Kimi-VL-A3B-Instruct, -Thinking          |

Sources: Kimi Linear, section 5.3; Kimi-Audio report, section 4; K2.5 report, section 4.1; Kimi-VL report, section 2.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from kimi_mm.audio.detokenizer_config import kimi_audio_detokenizer
from kimi_mm.config import (
    AudioEncoderConfig,
    AudioTokenizerConfig,
    BackboneConfig,
    ConfigError,
    GQAConfig,
    KDAConfig,
    MelConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    QuantizerConfig,
    RopeConfig,
    VocabConfig,
)
from kimi_mm.vision.presets import PRESETS as EYES

# The ids that the processor asks for; the other specials of a vocabulary are read from its own files.
KIMI_AUDIO_VOCAB = VocabConfig(
    num_text_tokens=151_643,
    num_audio_codes=16_384,
    audio_start=152_064,
    special_ids={
        "pad": 152_063,
        "msg_end": 151_645,
        "user_start": 151_670,
        "assistant_start": 151_671,
        "text_blank": 151_666,
        "text_eos": 151_667,
        "media_begin": 151_661,
        "media_end": 151_663,
        "media_pad": 151_662,  # reserved_token_12: stands where codes will stand, never reaches the model
        "continue_text": 151_675,
        "continue_speech": 151_676,
    },
)
K2_VOCAB = VocabConfig(
    num_text_tokens=163_584,
    num_audio_codes=0,
    audio_start=163_840,
    special_ids={
        "bos": 163_584,
        "pad": 163_839,
        "msg_end": 163_586,
        "text_eos": 163_586,
        "text_blank": 163_839,
        "user_start": 163_587,
        "assistant_start": 163_588,
        "system_start": 163_594,
        "message_middle": 163_601,
        "media_begin": 163_602,
        "media_content": 163_603,
        "media_end": 163_604,
        "media_pad": 163_605,
    },
)

_WHISPER_LARGE = AudioEncoderConfig(
    hidden_size=1280,
    num_layers=32,
    num_heads=20,
    intermediate_size=5120,
    causal_convolution=False,
    block_size=None,
    learned_positions=True,
)


def kimi_audio_tokenizer() -> AudioTokenizerConfig:
    """Returns GLM-4-Voice's tokenizer for codes, 343.6 M parameters, and fine-tuned Whisper large-v3 for features."""
    return AudioTokenizerConfig(
        mel=MelConfig(num_mel_bins=128, dynamic_range="clip"),
        encoder=_WHISPER_LARGE.replace(num_layers=16, causal_convolution=True, block_size=200, final_norm=False),
        feature_encoder=_WHISPER_LARGE,
        quantizer=QuantizerConfig(codebook_size=16_384, codebook_dim=1280, hidden_layers=0, ema_decay=0.99),
    )


def kimi_audio() -> ModelConfig:
    """Returns Kimi-Audio-7B: Qwen2.5-7B whose last six layers exist twice, once for text and once for audio."""
    return ModelConfig(
        name="kimi-audio-7b",
        audio=kimi_audio_tokenizer(),
        backbone=BackboneConfig(
            vocab_size=168_448,
            hidden_size=3584,
            trunk=("gqa/dense",) * 22,
            text_branch=("gqa/dense",) * 6,
            audio_branch=("gqa/dense",) * 6,
            audio_head=True,
            intermediate_size=18_944,
            rms_norm_eps=1e-6,
            residual="plain",
            adaptor_input_size=5120,
            gqa=GQAConfig(num_heads=28, num_kv_heads=4, head_dim=128, rope=RopeConfig(theta=1_000_000.0)),
        ),
        detokenizer=kimi_audio_detokenizer(),
        vocab=KIMI_AUDIO_VOCAB,
        audio_delay=6,
    )


def kimi_linear() -> ModelConfig:
    """Returns Kimi-Linear-48B-A3B: 20 KDA and 7 MLA layers without positions, 256 experts of which 8 work."""
    mixers = ["mla" if layer in (4, 8, 12, 16, 20, 24, 27) else "kda" for layer in range(1, 28)]
    return ModelConfig(
        name="kimi-linear-48b-a3b",
        hears=False,
        backbone=BackboneConfig(
            vocab_size=163_840,
            hidden_size=2304,
            trunk=tuple(f"{mixer}/{'moe' if layer else 'dense'}" for layer, mixer in enumerate(mixers)),
            intermediate_size=9216,
            residual="plain",
            kda=KDAConfig(num_heads=32, head_dim=128, gate="softplus"),
            mla=MLAConfig(
                num_heads=32,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
                kv_norm_eps=1e-5,
            ),
            moe=MoEConfig(
                num_experts=256, num_experts_per_token=8, intermediate_size=1024, routed_scaling_factor=2.446
            ),
        ),
        vocab=K2_VOCAB,
    )


def kimi_k25() -> ModelConfig:
    """Returns Kimi K2.5: K2's text model, 1.03 T parameters, and MoonViT-3D."""
    rope = RopeConfig(theta=50_000.0, interleaved=True, yarn_factor=64.0, yarn_mscale=1.0, yarn_mscale_all_dim=1.0)
    return ModelConfig(
        name="kimi-k2.5",
        hears=False,
        vision=EYES["kimi_k25"],
        backbone=BackboneConfig(
            vocab_size=163_840,
            hidden_size=7168,
            trunk=("mla/dense",) + ("mla/moe",) * 60,
            intermediate_size=18_432,
            residual="plain",
            mla=_deepseek_mla(heads=64, q_rank=1536, rope=rope.replace(yarn_beta_fast=32.0)),
            moe=MoEConfig(
                num_experts=384, num_experts_per_token=8, intermediate_size=2048, routed_scaling_factor=2.827
            ),
        ),
        vocab=K2_VOCAB,
    )


def kimi_vl() -> ModelConfig:
    """Returns Kimi-VL-A3B: Moonlight-16B-A3B and MoonViT."""
    return ModelConfig(
        name="kimi-vl-a3b",
        hears=False,
        vision=EYES["kimi_vl"],
        backbone=BackboneConfig(
            vocab_size=163_840,
            hidden_size=2048,
            trunk=("mla/dense",) + ("mla/moe",) * 26,
            intermediate_size=11_264,
            residual="plain",
            mla=_deepseek_mla(heads=16, q_rank=None, rope=RopeConfig(theta=800_000.0, interleaved=True)),
            moe=MoEConfig(
                num_experts=64,
                num_experts_per_token=6,
                intermediate_size=1408,
                num_shared_experts=2,
                routed_scaling_factor=2.446,
            ),
        ),
        vocab=K2_VOCAB,
    )


def _deepseek_mla(heads: int, q_rank: int | None, rope: RopeConfig) -> MLAConfig:
    return MLAConfig(
        num_heads=heads,
        q_lora_rank=q_rank,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        kv_norm_eps=1e-6,
        rope=rope,
    )


@dataclass(frozen=True)
class Published:
    """A preset: its config, the layout of its files and the repositories that have them."""

    config: ModelConfig
    layout: str
    repositories: tuple[str, ...]


PRESETS: dict[str, Published] = {
    "kimi-linear-48b-a3b": Published(
        kimi_linear(),
        "kimi_linear",
        ("moonshotai/Kimi-Linear-48B-A3B-Instruct", "moonshotai/Kimi-Linear-48B-A3B-Base"),
    ),
    "kimi-audio-7b": Published(
        kimi_audio(), "kimi_audio", ("moonshotai/Kimi-Audio-7B-Instruct", "moonshotai/Kimi-Audio-7B")
    ),
    "kimi-k2.5": Published(kimi_k25(), "kimi_k25", ("moonshotai/Kimi-K2.5",)),
    "kimi-vl-a3b": Published(
        kimi_vl(), "kimi_vl", ("moonshotai/Kimi-VL-A3B-Instruct", "moonshotai/Kimi-VL-A3B-Thinking")
    ),
}


def published_preset(name: str) -> Published:
    """Returns a published model by preset or repository name; ConfigError names the nearest one."""
    by_repository = {repository.lower(): preset for preset in PRESETS.values() for repository in preset.repositories}
    found = PRESETS.get(name.lower()) or by_repository.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), [*PRESETS, *by_repository], n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(PRESETS)}."
        raise ConfigError(f"published model '{name}' is unknown; {hint}")
    return found
