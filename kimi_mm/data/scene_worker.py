"""What a process that draws scenes does: put batches into shared memory. Nothing here takes torch."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from dataclasses import dataclass

from kimi_mm.config import VocabConfig
from kimi_mm.data.scene_drawer import SceneDrawer
from kimi_mm.data.slots import Slots
from kimi_mm.layout import Layout
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.vision_config import SceneDataConfig


@dataclass(frozen=True)
class Settings:
    """What a drawer is made from; `tokenizer` is its JSON, and `lead` an argument of its class."""

    config: SceneDataConfig
    vocab: VocabConfig
    tokenizer: str
    lead: bool
    seed: int


_worker: list[tuple[SceneDrawer, Slots]] = []


def start(settings: Slots, slots: Slots) -> None:
    """Readies this process. Settings come through shared memory: large arguments would hold up whoever starts it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the trainer's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    made: Settings = pickle.loads(settings[0].tobytes())
    layout = Layout(made.vocab, TextTokenizer.from_json(made.tokenizer, made.lead))
    _worker.append((SceneDrawer(made.config, layout, made.seed), slots))


def draw(number: int, slot: int) -> int:
    """Draws batch `number` into a slot, and returns how many labels it has."""
    drawer, slots = _worker[0]
    return len(drawer.draw(number, slots[slot]).labels)


def _end_with_parent() -> None:
    """Ends this process when its parent is gone, killed perhaps, for whose next order it would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
