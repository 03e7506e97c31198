"""Every knob of a model, as frozen dataclasses composed into one `ModelConfig`.

    ModelConfig
    ├── audio      AudioTokenizerConfig   wave ─► mel ─► encoder ─► codes + features (12.5 Hz)
    │   ├── mel        MelConfig
    │   ├── encoder    AudioEncoderConfig
    │   └── quantizer  QuantizerConfig
    ├── vision     VisionConfig | None    pixels ─► patches ─► tower ─► merger ─► projector ─► rows of the backbone
    │   ├── tower      VisionTowerConfig
    │   └── input      VisionInputConfig  resizing, patch budgets, frame sampling
    ├── backbone   BackboneConfig         trunk ─► {text branch, audio branch}
    │   ├── kda / mla / gqa               token mixers, present when a layer asks for them
    │   └── moe                           mixture of experts, likewise
    ├── detokenizer  DetokenizerConfig | None   codes ─► mel ─► 24 kHz wave (kimi_mm.audio.detokenizer_config)
    └── vocab      VocabConfig            ids of the joint vocabulary

The YAML form mirrors the classes one to one (`to_yaml`, `from_yaml`). An unknown key is refused with the nearest
known one; a missing key takes the class default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from kimi_mm.audio.detokenizer_config import DetokenizerConfig
from kimi_mm.config_base import Config as Config
from kimi_mm.config_base import ConfigError as ConfigError
from kimi_mm.config_base import choice as _choice
from kimi_mm.config_base import positive as _positive

MIXERS = ("kda", "mla", "gqa")
MLPS = ("dense", "moe")


# ---- audio in -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MelConfig(Config):
    """Whisper's log-mel definition: periodic Hann, power spectrum, Slaney filters, log10, (x + 4) / 4."""

    sample_rate: int = 16_000
    n_fft: int = 400
    hop_length: int = 160
    num_mel_bins: int = 80
    # "clip": floor = max over the clip - 8, as Whisper and GLM-4-Voice do; needs the whole clip.
    # "running": floor = max(0, max so far up to the end of the encoder block) - 8; streams.
    dynamic_range: str = "running"

    def __post_init__(self) -> None:
        _choice("dynamic_range", self.dynamic_range, ("clip", "running"))


@dataclass(frozen=True, kw_only=True)
class AudioEncoderConfig(Config):
    """Whisper-style encoder: two convolutions (100 -> 50 Hz), then pre-LN transformer layers.

    `causal_convolution` pads both convolutions on the left only. `block_size` (50 Hz frames) makes attention
    block-causal: a frame sees its own block and all earlier ones; None is full attention.
    """

    hidden_size: int = 384
    num_layers: int = 4
    num_heads: int = 6
    intermediate_size: int = 1536
    max_positions: int = 1500  # 50 Hz frames: 30 s segments, the state restarts at each
    causal_convolution: bool = True
    block_size: int | None = 100
    final_norm: bool = True
    learned_positions: bool = False  # False: Whisper's sinusoids, recomputed, not stored


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig(Config):
    """One codebook of squared-L2 nearest neighbours with EMA updates and revival of dead codes.

    `hidden_layers` transformer layers run at 12.5 Hz between the pooled encoder output and the codebook
    (0 reproduces the published tokenizer, which quantizes the average-pooled encoder state itself).
    """

    codebook_size: int = 4096
    codebook_dim: int = 64
    hidden_layers: int = 2
    hidden_size: int = 384
    num_heads: int = 6
    commitment_weight: float = 0.25
    ema_decay: float = 0.99
    revive_below: float = 0.02  # codes whose EMA count falls below this are re-seeded from the batch


@dataclass(frozen=True, kw_only=True)
class AudioTokenizerConfig(Config):
    """12.5 Hz tokenizer: `pooling` consecutive 50 Hz encoder frames make one code and one feature row.

    With a `feature_encoder` the features come from an encoder of their own, which hears each segment padded to its
    full length (Kimi-Audio's fine-tuned Whisper); without one, codes and features share `encoder`.
    """

    mel: MelConfig = field(default_factory=MelConfig)
    encoder: AudioEncoderConfig = field(default_factory=AudioEncoderConfig)
    feature_encoder: AudioEncoderConfig | None = None
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    pooling: int = 4

    @property
    def feature_size(self) -> int:
        """Width of one continuous feature row: `pooling` encoder frames side by side."""
        return self.pooling * (self.feature_encoder or self.encoder).hidden_size

    @property
    def samples_per_code(self) -> int:
        """Input samples per code: 1280 at 16 kHz, 12.5 codes per second."""
        return self.mel.hop_length * 2 * self.pooling

    def __post_init__(self) -> None:
        block, segment = self.encoder.block_size, self.encoder.max_positions
        # Only a stream needs whole blocks; the published tokenizer ends its 30 s in half a block.
        whole = self.mel.dynamic_range != "running" or self.feature_encoder is not None
        if block is not None and (block % self.pooling or (segment % block and not whole)):
            raise ConfigError(
                f"encoder.block_size={block} must be a multiple of pooling={self.pooling} "
                f"and divide encoder.max_positions={segment}."
            )
        if self.feature_encoder is not None and self.feature_encoder.max_positions != self.encoder.max_positions:
            raise ConfigError("feature_encoder.max_positions must equal encoder.max_positions.")


# ---- vision in ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VisionTowerConfig(Config):
    """MoonViT-3D (K2.5 report, section 4.1): pre-LN transformer over packed patches. `max_frames=1` is MoonViT."""

    patch_size: int = 14  # pixels a side
    hidden_size: int = 1152
    num_layers: int = 27
    num_heads: int = 16
    intermediate_size: int = 4304
    position_height: int = 64  # rows and columns of the learned table, resampled to each item's grid
    position_width: int = 64
    max_frames: int = 4  # frames of one clip chunk, and rows of the time table
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _positive(self)
        if self.hidden_size % (4 * self.num_heads):
            raise ConfigError(f"hidden_size={self.hidden_size} must be a multiple of 4 * num_heads={self.num_heads}.")


@dataclass(frozen=True, kw_only=True)
class VisionInputConfig(Config):
    """How pictures and clips become patches; the defaults are K2.5's, except for `alpha`.

    Budgets are compared with floor counts before padding, as published, so that an item may exceed them by a few
    per cent. `alpha`: "white" shows transparent pictures on white, "drop" ignores transparency as the published
    processor does, which uncovers whatever colour lies below.
    """

    max_patches: int = 16_384  # of one picture
    max_patches_per_side: int = 512
    max_patches_per_frame: int = 4096
    max_patches_per_video: int | None = None  # shared among the sampled frames
    sample_fps: float = 2.0
    max_frames_per_video: int | None = None
    alpha: str = "white"
    max_pixels: int = 100_000_000  # larger pictures are refused before they are decoded

    def __post_init__(self) -> None:
        _choice("alpha", self.alpha, ("white", "drop"))
        _positive(self)


@dataclass(frozen=True, kw_only=True)
class VisionConfig(Config):
    """Eyes: what goes in, the tower, and the projector to rows of `output_size`, one for `merge_size`^2 patches."""

    input: VisionInputConfig = field(default_factory=VisionInputConfig)
    tower: VisionTowerConfig = field(default_factory=VisionTowerConfig)
    merge_size: int = 2
    projector_norm_eps: float = 1e-5
    output_size: int = 7168  # hidden size of the backbone

    def __post_init__(self) -> None:
        _positive(self)


# ---- backbone -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class KDAConfig(Config):
    """Kimi Delta Attention (Kimi Linear, eq. 1). `num_value_heads` is a multiple of `num_heads`.

    `gate`: "softplus" is Kimi Linear's -exp(A) * softplus(z); "bounded" is lower * sigmoid(exp(A) * z).
    """

    num_heads: int = 4
    num_value_heads: int | None = None  # None: equal to num_heads
    head_dim: int = 64
    value_head_dim: int | None = None  # None: equal to head_dim
    conv_kernel_size: int = 4
    gate: str = "bounded"
    gate_lower_bound: float = -5.0
    gate_rank: int | None = None  # width of the low-rank decay and output gates; None: head_dim
    output_gate_bias: bool = False

    def __post_init__(self) -> None:
        _choice("gate", self.gate, ("bounded", "softplus"))
        if not -5.0 <= self.gate_lower_bound < 0.0:
            raise ConfigError(f"gate_lower_bound={self.gate_lower_bound} must lie in [-5, 0).")
        if self.value_heads % self.num_heads:
            raise ConfigError(f"num_value_heads={self.value_heads} is not a multiple of num_heads={self.num_heads}.")

    @property
    def value_heads(self) -> int:
        return self.num_value_heads or self.num_heads

    @property
    def value_dim(self) -> int:
        return self.value_head_dim or self.head_dim


@dataclass(frozen=True, kw_only=True)
class RopeConfig(Config):
    """Rotary positions. `yarn_factor` > 1 stretches them as DeepSeek-V3 and K2 do."""

    theta: float = 10_000.0
    interleaved: bool = False  # pairs (0,1),(2,3).. instead of the two halves
    yarn_factor: float = 1.0
    yarn_original_positions: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float = 1.0
    yarn_mscale_all_dim: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MLAConfig(Config):
    """Multi-head latent attention. `rope=None` is NoPE: the shared `qk_rope_head_dim` stays, unrotated."""

    num_heads: int = 4
    q_lora_rank: int | None = None
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    kv_norm_eps: float = 1e-6
    rope: RopeConfig | None = None


@dataclass(frozen=True, kw_only=True)
class GQAConfig(Config):
    """Grouped-query attention with rotary positions (Qwen2.5 layout when `qkv_bias`)."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    qkv_bias: bool = True
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(theta=1_000_000.0))


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Config):
    """Sigmoid-routed experts with a selection bias, and shared experts (DeepSeek-V3, K2, Kimi Linear)."""

    num_experts: int = 8
    num_experts_per_token: int = 2
    intermediate_size: int = 128
    num_shared_experts: int = 1
    routed_scaling_factor: float = 1.0
    normalize_weights: bool = True
    num_groups: int = 1
    top_groups: int = 1
    bias_update_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.num_experts % self.num_groups:
            raise ConfigError(f"num_experts={self.num_experts} is not a multiple of num_groups={self.num_groups}.")
        if self.num_experts_per_token > self.num_experts // self.num_groups * self.top_groups:
            raise ConfigError(f"num_experts_per_token={self.num_experts_per_token} exceeds the selectable experts.")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(Config):
    """Shared trunk, then a text branch and an audio branch, each a list of "mixer/mlp" layers.

    A layer is written "kda/moe", "mla/dense", "gqa/dense" and so on. Both branches read the trunk's output; an empty
    audio branch with `audio_head=False` is a text-only decoder.
    """

    vocab_size: int = 8192
    hidden_size: int = 256
    trunk: tuple[str, ...] = ()
    text_branch: tuple[str, ...] = ()
    audio_branch: tuple[str, ...] = ()
    audio_head: bool = False
    intermediate_size: int = 1024  # of dense MLPs
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    residual: str = "attn_res"  # or "plain"
    attn_res_block_size: int = 4  # sublayers per block (two a layer); 1 is full AttnRes
    adaptor_input_size: int | None = None  # width of continuous audio features; None: no adaptor
    kda: KDAConfig | None = None
    mla: MLAConfig | None = None
    gqa: GQAConfig | None = None
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        _choice("residual", self.residual, ("plain", "attn_res"))
        if self.attn_res_block_size != 1 and self.attn_res_block_size % 2:
            raise ConfigError(f"attn_res_block_size={self.attn_res_block_size} must be 1 or even.")
        for part in ("trunk", "text_branch", "audio_branch"):
            for index, layer in enumerate(getattr(self, part)):
                mixer, _, mlp = layer.partition("/")
                if mixer not in MIXERS or mlp not in MLPS:
                    raise ConfigError(
                        f"{part}[{index}]='{layer}' is not 'mixer/mlp' with a mixer of {MIXERS} and an mlp of {MLPS}."
                    )
                for name in (mixer, mlp):
                    if name != "dense" and getattr(self, name) is None:
                        raise ConfigError(f"{part}[{index}]='{layer}' needs the section '{name}', which is missing.")
        if self.audio_branch and not self.audio_head:
            raise ConfigError("audio_branch has layers but audio_head is false.")


# ---- the whole ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VocabConfig(Config):
    """Layout of the joint vocabulary: text BPE ids, then special ids, then audio codes at `audio_offset`.

    A published vocabulary says where its specials are (`special_ids`, ids by the names of `SPECIALS`; those it lacks
    are left out) and where its audio codes start.
    """

    SPECIALS: ClassVar[tuple[str, ...]] = (
        "pad",
        "msg_end",
        "user_start",
        "assistant_start",
        "system_start",
        "text_blank",
        "text_eos",
        "media_begin",
        "media_end",
        "media_pad",
        "continue_text",
        "continue_speech",
        "video_begin",
        "video_end",
        "media_content",
        "reserved_1",
    )

    num_text_tokens: int = 4080  # BPE ids 0 .. num_text_tokens - 1; specials follow
    num_audio_codes: int = 4096
    special_ids: dict[str, int] | None = None  # None: all of `SPECIALS` in order, right behind the text
    audio_start: int | None = None  # id of code 0; None: right behind the specials

    @property
    def specials(self) -> dict[str, int]:
        """Ids of the special tokens that this vocabulary has, by name."""
        if self.special_ids is not None:
            return dict(self.special_ids)
        return {name: self.num_text_tokens + index for index, name in enumerate(self.SPECIALS)}

    def special(self, name: str) -> int:
        """Returns the id of a special token.

        Raises:
            ConfigError: when this vocabulary has no such token.
        """
        ids = self.specials
        if name not in ids:
            raise ConfigError(f"this model's vocabulary has no token '{name}'; it has {', '.join(ids)}.")
        return ids[name]

    @property
    def audio_offset(self) -> int:
        return self.num_text_tokens + len(self.SPECIALS) if self.audio_start is None else self.audio_start

    @property
    def size(self) -> int:
        return self.audio_offset + self.num_audio_codes


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """A whole model. `audio_delay` is the number of steps by which the audio stream trails the text stream.

    A model that does not hear (`hears=False`: Kimi-Linear, K2) has no audio stream either; `audio` means nothing then.
    """

    name: str = "unnamed"
    hears: bool = True
    audio: AudioTokenizerConfig = field(default_factory=AudioTokenizerConfig)
    vision: VisionConfig | None = None  # None: no eyes
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    detokenizer: DetokenizerConfig | None = None  # None: no voice
    vocab: VocabConfig = field(default_factory=VocabConfig)
    audio_delay: int = 6

    def __post_init__(self) -> None:
        if self.backbone.vocab_size != self.vocab.size:
            raise ConfigError(f"backbone.vocab_size={self.backbone.vocab_size} differs from vocab's {self.vocab.size}.")
        if self.hears and self.vocab.num_audio_codes != self.audio.quantizer.codebook_size:
            raise ConfigError(
                f"vocab.num_audio_codes={self.vocab.num_audio_codes} differs from "
                f"audio.quantizer.codebook_size={self.audio.quantizer.codebook_size}."
            )
        width = self.backbone.adaptor_input_size
        if width is not None and width != self.audio.feature_size:
            raise ConfigError(
                f"backbone.adaptor_input_size={width} differs from the tokenizer's {self.audio.feature_size}."
            )
        if self.vision is not None and self.vision.output_size != self.backbone.hidden_size:
            raise ConfigError(
                f"vision.output_size={self.vision.output_size} differs from "
                f"backbone.hidden_size={self.backbone.hidden_size}."
            )
        if self.detokenizer is not None:
            seconds = self.audio.samples_per_code / self.audio.mel.sample_rate
            self.detokenizer.check_tokenizer(self.audio.quantizer.codebook_size, seconds)
