"""Settings of the stages "detokenizer" and "vocoder", sections of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from kimi_mm.audio.detokenizer_config import TIME_GRIDS
from kimi_mm.config_base import Config, ConfigError, choice

SECONDS_PER_CODE = 0.08


@dataclass(frozen=True, kw_only=True)
class TargetDataConfig(Config):
    """Target shards (see `kimi_mm.data.targets`) and how they become rows of one length.

    `crops` takes rows out of single utterances, anywhere; otherwise utterances of one voice follow each other, with
    pauses, until a row is full. `weights` repeats a folder's utterances within an epoch. `own_share` of the rows have
    their codes from the target itself instead of from the other voice that says the same.
    """

    folders: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    row_seconds: float = 8.0
    batch_rows: int = 32
    crops: bool = False
    own_share: float = 0.5

    def __post_init__(self) -> None:
        if (
            self.batch_rows < 1
            or abs(self.row_seconds / SECONDS_PER_CODE - self.row_codes) > 1e-6
            or not self.row_codes
        ):
            raise ConfigError(f"row_seconds={self.row_seconds} must be a multiple of 0.08, and batch_rows at least 1.")

    @property
    def row_codes(self) -> int:
        return round(self.row_seconds / SECONDS_PER_CODE)


@dataclass(frozen=True, kw_only=True)
class FlowTrainingConfig(Config):
    """Conditional flow matching.

    Rows are cut into chunks of `min_chunk_codes` to `max_chunk_codes`; a share `whole_share` of the batches keeps them
    whole. `code_dropout` of the rows lose the codes of what is to be drawn (for guidance), `prompt_dropout` those of
    their first seconds, as with a speaker prompt of unknown words. Voices other than the canonical one are judged
    only after `prompt_seconds`: without a prompt, the canonical voice speaks. Flow `times` are drawn evenly
    ("linear") or as 1 - cos(pi u / 2) ("cosine"), more of them near the noise, where a solver of few steps takes its
    first ones.
    """

    min_chunk_codes: int = 3
    max_chunk_codes: int = 30
    whole_share: float = 0.1
    code_dropout: float = 0.1
    prompt_dropout: float = 0.3
    prompt_seconds: float = 1.0
    times: str = "linear"

    def __post_init__(self) -> None:
        choice("times", self.times, TIME_GRIDS)
        if not 1 <= self.min_chunk_codes <= self.max_chunk_codes:
            raise ConfigError(
                f"min_chunk_codes={self.min_chunk_codes} must lie between 1 and max_chunk_codes={self.max_chunk_codes}."
            )


@dataclass(frozen=True, kw_only=True)
class VocoderTrainingConfig(Config):
    """Weights of the vocoder's losses; discriminators join after the recipe's `augment_from` share of the steps.

    `mel_noise` is the standard deviation of what is added to the log-mel, which a DiT never draws perfectly.
    """

    mel_weight: float = 15.0
    stft_weight: float = 2.0
    adversarial_weight: float = 1.0
    feature_weight: float = 2.0
    mel_noise: float = 0.05
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    resolutions: tuple[int, ...] = (512, 1024, 2048)
    channels: int = 24  # of the discriminators' first layers


@dataclass(frozen=True, kw_only=True)
class SpokenDataConfig(Config):
    """What the stage "speech" learns to say.

    Args:
        targets: folders of target shards (`kimi-mm prepare targets`); those in the canonical voice are read out.
        dialogs: folders of prepared dialogs (`kimi-mm prepare dialogs`), for instance "data/dialogs/train".
        batch_seconds: of answers in a batch; questions come on top.
        buckets: seconds that the longest recording of a row may have; longer ones are dropped.
        written_share: of the questions that are written instead of spoken.
        spelled: shares of the words of one id, and of those of several, that stand by letter in a sentence to be read
            out (`TextTokenizer.encode_words`): what BPE dropout is to translation.
    """

    targets: tuple[str, ...] = ()
    dialogs: tuple[str, ...] = ()
    batch_seconds: float = 320.0
    buckets: tuple[float, ...] = (2.56, 3.84, 5.12, 7.68, 10.24)
    written_share: float = 0.15
    spelled: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if any(b <= 0 or abs(b / SECONDS_PER_CODE - round(b / SECONDS_PER_CODE)) > 1e-6 for b in self.buckets):
            raise ConfigError(f"buckets={list(self.buckets)} must be multiples of 0.08, above 0.")
        if not 0 <= self.written_share <= 1 or self.batch_seconds <= 0:
            raise ConfigError("written_share must lie in [0, 1], batch_seconds above 0.")
        if len(self.spelled) != 2 or not all(0 <= share <= 1 for share in self.spelled):
            raise ConfigError(f"spelled={list(self.spelled)} must be two shares in [0, 1].")
