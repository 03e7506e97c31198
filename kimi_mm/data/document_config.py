"""Settings of data that users bring, the section `data` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from kimi_mm.config_base import Config, ConfigError, choice

PAIRS = ("audio_to_text", "image_to_text", "video_to_text")
INTERLEAVED = ("interleaved_codes", "interleaved_text", "interleaved_both")
LAYOUTS = ("conversation", "document", *PAIRS, "audio", "text_to_audio", *INTERLEAVED)


@dataclass(frozen=True, kw_only=True)
class DataSourceConfig(Config):
    """Files of one kind.

    Args:
        files: `.jsonl` files and WebDataset `.tar` files.
        layout: "conversation" (messages, loss on what the assistant says), "document" (text alone, or interleaved with
            recordings, pictures and clips; loss on all text), "audio_to_text", "image_to_text" and "video_to_text" (one
            medium as the user's, and its transcript or caption as the answer), "audio" (loss on its codes),
            "text_to_audio" (loss on the codes); and with rows of segments, every first one heard and every second one
            learnt as codes ("interleaved_codes"), text ("interleaved_text") or both ("interleaved_both").
        weight: share of the positions of all batches, in any unit.
        name: by which losses are logged; "": the media that a document holds.
    """

    files: tuple[str, ...] = ()
    layout: str = "conversation"
    weight: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        choice("layout", self.layout, LAYOUTS)
        if self.weight <= 0:
            raise ConfigError(f"weight={self.weight} must be above 0; leave the source out instead.")


@dataclass(frozen=True, kw_only=True)
class DocumentDataConfig(Config):
    """What is trained on, and how documents become batches.

    Args:
        sources: where documents come from.
        batch_positions: of the backbone in a batch; a document may not be longer.
        pack: many documents in one row that do not see each other; otherwise rows of like length, padded.
        look_ahead: documents that are packed, or sorted into buckets, together.
        vision_share: share of the positions that sources with pictures or clips get from the first step to the last,
            whatever the weights ("early fusion"; K2.5 found 0.1 best); 0 leaves the weights alone.
        speech_weight: of the loss of audio codes, where the assistant speaks.
        skip_bad: train without the samples that cannot be used, instead of stopping.
        cache: folder of the codes and features of recordings; "": `cache` in the run's folder.
    """

    sources: tuple[DataSourceConfig, ...] = ()
    batch_positions: int = 4096
    pack: bool = True
    look_ahead: int = 512
    vision_share: float = 0.0
    speech_weight: float = 1.0
    skip_bad: bool = False
    cache: str = ""

    def __post_init__(self) -> None:
        if min(self.batch_positions, self.look_ahead) < 1:
            raise ConfigError("batch_positions and look_ahead must be at least 1.")
        if not 0.0 <= self.vision_share < 1.0:
            raise ConfigError(f"vision_share={self.vision_share} must lie in [0, 1).")
