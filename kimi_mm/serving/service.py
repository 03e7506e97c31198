"""What the routes of one server share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread
import numpy as np

from kimi_mm.audio.io import read_audio
from kimi_mm.serving.answers import Answers
from kimi_mm.serving.engine import Engine
from kimi_mm.serving.gate import Gate
from kimi_mm.serving.metrics import Metrics
from kimi_mm.serving.problems import ApiError
from kimi_mm.serving.settings import ServeConfig
from kimi_mm.serving.spoken_store import SpokenStore

if TYPE_CHECKING:
    from kimi_mm.pipeline import KimiMM


@dataclass
class Service:
    """A model behind an engine, and the limits under which it answers."""

    model: KimiMM
    config: ServeConfig
    engine: Engine
    gate: Gate
    metrics: Metrics
    answers: Answers
    spoken: SpokenStore = field(default_factory=SpokenStore)
    sessions: int = 0  # of /v1/realtime
    started: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, model: KimiMM, config: ServeConfig) -> Service:
        """Starts an engine over a model."""
        engine = Engine(
            model,
            cache_bytes=config.cache_mib * 2**20,
            max_rows=config.max_rows,
            reuse_bytes=config.reuse_mib * 2**20,
            threads=config.threads,
        )
        gate = Gate(config.max_requests, config.max_waiting)
        metrics = Metrics(engine, gate)
        return cls(model, config, engine, gate, metrics, Answers(gate, metrics, config.request_seconds))

    @property
    def model_id(self) -> str:
        """The name that requests use."""
        return Path(self.config.model).name

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 unless `name` is the loaded model's."""
        if name != self.model_id:
            raise ApiError(
                404,
                f"the model '{name[:80]}' is not loaded here; this server has '{self.model_id}'.",
                param="model",
                code="model_not_found",
            )

    async def read_audio(self, data: bytes) -> tuple[np.ndarray, float]:
        """Decodes a sound file aside: mono 16 kHz samples, and its length in seconds. AudioError as `read_audio`."""
        wave, seconds = await anyio.to_thread.run_sync(
            lambda: read_audio(data, max_seconds=self.config.max_audio_seconds)
        )
        self.metrics.audio.inc(seconds)
        return wave, seconds
