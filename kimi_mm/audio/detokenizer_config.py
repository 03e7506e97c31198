"""Knobs of speech output. The defaults of `DiTConfig`, `BigVGANConfig`, `TargetMelConfig` and `StreamingConfig` are
Kimi-Audio's published shapes; `kimi_audio_detokenizer()` puts them together.

    DetokenizerConfig
    ├── mel         TargetMelConfig    24 kHz wave ─► log-mel, 50 Hz
    ├── dit         DiTConfig          codes, noise ─► mel by flow matching
    ├── vocoder     VocoderConfig      mel ─► wave: ConvNeXt and inverse STFT, streams exactly      (one of
    ├── bigvgan     BigVGANConfig      mel ─► wave: the published architecture                      the two)
    └── streaming   StreamingConfig    chunk sizes, look-ahead, solver
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kimi_mm.config_base import Config, ConfigError, choice

SOLVERS = ("euler", "midpoint")
TIME_GRIDS = ("linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class TargetMelConfig(Config):
    """Natural logarithm of mel magnitudes, Slaney filters from 0 Hz to half the rate, normalised by one mean and std.

    Frame t is centred on the middle of samples [hop * t, hop * (t + 1)).
    """

    sample_rate: int = 24_000
    n_fft: int = 1024
    hop_length: int = 480
    num_mel_bins: int = 80
    mean: float = -4.479605
    std: float = 3.4584913

    def __post_init__(self) -> None:
        _above_zero(self, "sample_rate", "n_fft", "hop_length", "num_mel_bins", "std")
        if self.n_fft < self.hop_length or (self.n_fft - self.hop_length) % 2:
            raise ConfigError(f"n_fft={self.n_fft} must exceed hop_length={self.hop_length} by an even number.")


@dataclass(frozen=True, kw_only=True)
class DiTConfig(Config):
    """Diffusion transformer over mel frames, modulated per frame by time and code.

    `modulation_rank` squeezes the modulation of every layer through that many channels (None: full rank, as
    published). `frame_phase` adds an embedding of the frame's place within its code, `condition_input` adds the
    condition to the first layer's input, too. `integer_time` rounds the thousandths of flow time down, as the
    published weights expect. `context_frames` is the length of the past that attention may see, speaker prompt
    included.
    """

    hidden_size: int = 2304
    num_layers: int = 16
    num_heads: int = 18
    intermediate_size: int = 9216
    codebook_size: int = 16_384
    time_size: int = 256
    modulation_rank: int | None = None
    frame_phase: bool = False
    condition_input: bool = False
    integer_time: bool = True
    rope_theta: float = 10_000.0
    context_frames: int = 900

    def __post_init__(self) -> None:
        _above_zero(self, "hidden_size", "num_layers", "num_heads", "intermediate_size", "codebook_size", "time_size")
        if self.hidden_size % (2 * self.num_heads) or self.time_size % 2:
            raise ConfigError(
                f"hidden_size={self.hidden_size} must be a multiple of 2 * num_heads={2 * self.num_heads}, "
                f"and time_size={self.time_size} even."
            )
        if self.modulation_rank is not None:
            _above_zero(self, "modulation_rank")


@dataclass(frozen=True, kw_only=True)
class VocoderConfig(Config):
    """Causal ConvNeXt over mel frames made `upsample` times denser, then an inverse STFT.

    `look_ahead` mel frames of the future enter through the first convolution; everything behind it looks back only.
    The inverse STFT hops by the mel's hop / `upsample`, and its window `n_fft` is a multiple of that. With `source` the
    network filters a pulse train, whose pitch it tells from the mel, and noise, instead of drawing phases (see
    `kimi_mm.audio.excitation`).
    """

    hidden_size: int = 256
    num_layers: int = 8
    intermediate_size: int = 768
    kernel_size: int = 7
    upsample: int = 2
    n_fft: int = 960
    look_ahead: int = 2
    source: bool = False

    def __post_init__(self) -> None:
        _above_zero(self, "hidden_size", "num_layers", "intermediate_size", "kernel_size", "upsample", "n_fft")
        if not 0 <= self.look_ahead < self.kernel_size:
            raise ConfigError(f"look_ahead={self.look_ahead} must be at least 0 and below kernel_size.")


@dataclass(frozen=True, kw_only=True)
class BigVGANConfig(Config):
    """BigVGAN-v2 (Lee et al. 2023): upsampling stages, each followed by residual blocks with periodic activations."""

    upsample_rates: tuple[int, ...] = (5, 2, 2, 2, 2, 3, 2)
    upsample_kernels: tuple[int, ...] = (9, 4, 4, 4, 4, 5, 4)
    initial_channels: int = 2048
    resblock_kernels: tuple[int, ...] = (3, 5, 7, 11)
    resblock_dilations: tuple[int, ...] = (1, 3, 5)

    def __post_init__(self) -> None:
        if len(self.upsample_rates) != len(self.upsample_kernels):
            raise ConfigError("upsample_rates and upsample_kernels must have the same length.")
        if any(k < u or (k - u) % 2 for u, k in zip(self.upsample_rates, self.upsample_kernels, strict=True)):
            raise ConfigError("each of upsample_kernels must exceed its rate by an even number.")


@dataclass(frozen=True, kw_only=True)
class StreamingConfig(Config):
    """When sound comes out, and how it is solved for.

    The first sound needs `first_chunk_codes` codes, each later piece `chunk_codes` more; the last `look_ahead_codes`
    of what is there are solved for, too, but kept back and solved again with what follows. `guidance` above 1 is
    classifier-free guidance (twice the work). `time_grid`: "linear", or "cosine" with small steps at the noisy end.
    `fade` is the window that joins pieces of a vocoder that cannot stream ("hamming" as published: 8 % too loud in
    the middle of a fade; "hann": even).
    """

    first_chunk_codes: int = 30
    chunk_codes: int = 30
    look_ahead_codes: int = 12
    steps: int = 29
    solver: str = "euler"
    time_grid: str = "linear"
    guidance: float = 1.0
    fade: str = "hamming"

    def __post_init__(self) -> None:
        choice("solver", self.solver, SOLVERS)
        choice("time_grid", self.time_grid, TIME_GRIDS)
        choice("fade", self.fade, ("hamming", "hann"))
        _above_zero(self, "chunk_codes", "steps", "guidance")
        if not 0 <= self.look_ahead_codes < self.first_chunk_codes:
            raise ConfigError(
                f"look_ahead_codes={self.look_ahead_codes} must be at least 0 and below "
                f"first_chunk_codes={self.first_chunk_codes}."
            )


@dataclass(frozen=True, kw_only=True)
class DetokenizerConfig(Config):
    """Codes (12.5 Hz) to 24 kHz speech; `frames_per_code` mel frames for each code."""

    mel: TargetMelConfig = field(default_factory=TargetMelConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    vocoder: VocoderConfig | None = None
    bigvgan: BigVGANConfig | None = None
    streaming: StreamingConfig = field(default_factory=StreamingConfig)
    frames_per_code: int = 4
    sigma_min: float = 1e-4  # noise left at the end of the path

    def __post_init__(self) -> None:
        _above_zero(self, "frames_per_code")
        if (self.vocoder is None) == (self.bigvgan is None):
            raise ConfigError("give exactly one of the sections 'vocoder' and 'bigvgan'.")
        hop = self.mel.hop_length
        if self.vocoder is not None:
            step, odd = divmod(hop, self.vocoder.upsample)
            if odd or self.vocoder.n_fft % step or self.vocoder.n_fft < 3 * step or (self.vocoder.n_fft - step) % 2:
                raise ConfigError(
                    f"vocoder.n_fft={self.vocoder.n_fft} must be a multiple, three or more, of mel.hop_length / "
                    f"vocoder.upsample = {hop / self.vocoder.upsample:g}, and differ from it by an even number."
                )
        if self.bigvgan is not None:
            factor = 1
            for rate in self.bigvgan.upsample_rates:
                factor *= rate
            if factor != hop:
                raise ConfigError(f"bigvgan.upsample_rates multiply to {factor}, but mel.hop_length is {hop}.")

    @property
    def samples_per_code(self) -> int:
        """Output samples per code: 1920 at 24 kHz."""
        return self.frames_per_code * self.mel.hop_length

    def check_tokenizer(self, codebook_size: int, seconds_per_code: float) -> None:
        """Raises ConfigError unless the codes are those of a tokenizer with this codebook and rate."""
        if self.dit.codebook_size != codebook_size:
            raise ConfigError(
                f"detokenizer.dit.codebook_size={self.dit.codebook_size} differs from "
                f"audio.quantizer.codebook_size={codebook_size}."
            )
        if self.samples_per_code != round(seconds_per_code * self.mel.sample_rate):
            raise ConfigError(
                f"detokenizer: a code gives {self.samples_per_code} samples at {self.mel.sample_rate} Hz, "
                f"but stands for {seconds_per_code * 1000:g} ms."
            )


def kimi_audio_detokenizer() -> DetokenizerConfig:
    """Returns the shape of Kimi-Audio's detokenizer: 1,584 M parameters in the DiT, 241 M in the vocoder."""
    return DetokenizerConfig(bigvgan=BigVGANConfig())


def _above_zero(config: Config, *keys: str) -> None:
    for key in keys:
        if getattr(config, key) <= 0:
            raise ConfigError(f"{key}={getattr(config, key)} must be above 0.")
