"""The command line run inside the test process, on the shipped checkpoint, which is loaded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import kimi_mm
from kimi_mm.checkpoint import save_checkpoint
from kimi_mm.cli.demo import CLIPS, read_clips
from kimi_mm.cli.main import run
from kimi_mm.config import ModelConfig
from kimi_mm.model import Model
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.recipe import recipes_root


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("kimi-mm: ")]


@pytest.fixture(scope="session")
def nano():
    return kimi_mm.load("nano")


@pytest.fixture(scope="session")
def speaking(tmp_path_factory) -> str:
    """A random model with a voice."""
    folder = tmp_path_factory.mktemp("speaking")
    torch.manual_seed(0)
    model = Model(ModelConfig.from_yaml(recipes_root() / "models" / "debug-speech.yaml"))
    save_checkpoint(folder, model, TextTokenizer.train(["a few words"] * 3, 300), weights="fp32")
    return str(folder)


@pytest.fixture
def kimi(monkeypatch, capfd, nano) -> Callable[..., Outcome]:
    """Returns `kimi(*arguments)`; the model 'nano' comes from the session, others are loaded from disk."""
    real = kimi_mm.load

    def load(name="nano", device="cpu"):
        return nano if str(name) == "nano" else real(name, device)

    monkeypatch.setattr(kimi_mm, "load", load, raising=False)
    monkeypatch.delenv("KIMI_MM_DEBUG", raising=False)

    def call(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as stopped:
            run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Outcome(int(stopped.value.code or 0), out, err)

    return call


@pytest.fixture(scope="session")
def clips() -> list[tuple[Path, str]]:
    """The shipped recordings, shortest first, and what is said in them."""
    rows = sorted(read_clips(), key=lambda row: row["seconds"])
    return [(CLIPS / row["file"], row["text"]) for row in rows]


@pytest.fixture
def speech(clips, tmp_path) -> Callable[..., Path]:
    """Returns `speech(name, rate=16000, channels=1, **soundfile_options)`: a real clip, rewritten."""
    wave, source_rate = soundfile.read(clips[0][0], dtype="float32")

    def write(name: str, rate: int = 16_000, channels: int = 1, **options: str) -> Path:
        positions = np.arange(int(len(wave) * rate / source_rate)) * (source_rate / rate)
        resampled = np.interp(positions, np.arange(len(wave)), wave)
        path = tmp_path / name
        soundfile.write(path, np.tile(resampled[:, None], (1, channels)), rate, **options)
        return path

    return write
