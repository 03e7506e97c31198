"""Decides whether a step is taken: not one whose loss or gradient is not finite, nor one far above its recent losses.

    loss, gradient norm ─► finite? ─► within `spike_sigmas` of the last `window` losses of the same source? ─► step
                             └─ no ───────┴─ no ─► skipped, logged; `max_skipped` in a row end the run

A skipped step uses up its batch and nothing else. The history is part of a checkpoint, so that a resumed run decides as
an uninterrupted one would have.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any

from kimi_mm.config_base import Config, ConfigError
from kimi_mm.errors import UserError

log = logging.getLogger(__name__)
LEAST_HISTORY = 20  # losses that a spike is judged by, at least


class TrainingError(UserError):
    """A run that cannot go on; the message says what happened and what to do."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Config):
    """When steps are skipped, and when that ends the run.

    Args:
        spike_sigmas: skips a loss so many standard deviations above the mean of the recent ones; 0 never does.
        window: recent losses, of each source of batches.
        max_skipped: skipped steps in a row that end the run.
    """

    spike_sigmas: float = 0.0
    window: int = 200
    max_skipped: int = 10

    def __post_init__(self) -> None:
        if self.spike_sigmas < 0:
            raise ConfigError(f"spike_sigmas={self.spike_sigmas} must be 0 (off) or above.")
        if self.window < LEAST_HISTORY:
            raise ConfigError(f"window={self.window} must be at least {LEAST_HISTORY}.")
        if self.max_skipped < 1:
            raise ConfigError(f"max_skipped={self.max_skipped} must be at least 1.")


class Guard:
    """Judges one step after the other."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped = 0  # in all
        self.in_a_row = 0
        self._losses: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=config.window))

    def passes(self, step: int, source: str, loss: float, norm: float) -> bool:
        """Says whether to take the step.

        Args:
            step: number of the step, for messages.
            source: where its batch came from; losses of different sources are not compared.
            loss, norm: of the whole batch, the same numbers on every process.

        Raises:
            TrainingError: when this is the last skipped step that `max_skipped` allows.
        """
        reason = self._reason(source, loss, norm)
        if reason is None:
            self.in_a_row = 0
            self._losses[source].append(loss)
            return True
        self.skipped += 1
        self.in_a_row += 1
        log.warning("step %d skipped: %s (%d skipped so far)", step, reason, self.skipped)
        if self.in_a_row >= self.config.max_skipped:
            raise TrainingError(
                f"step {step}: {self.in_a_row} steps in a row were skipped, the last because {reason}; "
                "lower optim.lr, look at the data of these steps, or go on from an older checkpoint."
            )
        return False

    def _reason(self, source: str, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        recent = self._losses[source]
        if self.config.spike_sigmas and len(recent) >= LEAST_HISTORY:
            mean, deviation = statistics.fmean(recent), statistics.pstdev(recent)
            if loss > mean + self.config.spike_sigmas * deviation:
                return f"the loss {loss:.4g} is far above the recent {mean:.4g} +- {deviation:.2g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        losses = {source: list(recent) for source, recent in self._losses.items()}
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "losses": losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned, but forgives the skips in a row: a user who restarts wants a try."""
        self.skipped = state["skipped"]
        for source, recent in state["losses"].items():
            self._losses[source].clear()
            self._losses[source].extend(recent)
