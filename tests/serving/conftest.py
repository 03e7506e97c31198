"""Real servers in processes of their own, on loopback: the shipped model, and a tiny one with every ability."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("openai", reason="needs the extra 'dev'")

from kimi_mm.checkpoint import save_checkpoint
from kimi_mm.config import ModelConfig
from kimi_mm.model import Model
from kimi_mm.pipeline import KimiMM
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.recipe import recipes_root
from tests.serving.browser import browser  # noqa: F401
from tests.vision.tiny import EYES, shaken

KEY = "a-key-of-the-tests"


@dataclass
class Server:
    """A running `kimi-mm serve`."""

    process: subprocess.Popen
    url: str
    model: str
    key: str | None
    log: list[str] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def client(self, **options):
        """An `openai` client of this server."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, **options)

    def metrics(self) -> dict[str, float]:
        import requests

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        page = requests.get(f"{self.url}/metrics", headers=headers, timeout=20).text
        return {name: float(value) for name, value in re.findall(r"^([^#\s]+) (\S+)$", page, re.M)}

    def wait_until(self, name: str, value: float, seconds: float = 10.0) -> None:
        """Waits until a gauge has a value."""
        end = time.monotonic() + seconds
        while (now := self.metrics()[name]) != value:
            assert time.monotonic() < end, f"{name} is {now}, not {value}"
            time.sleep(0.05)


def start(folder: Path, model: str = "nano", key: str | None = None, settings: str = "", *arguments: str) -> Server:
    """Starts a server and waits until it says that it is ready; one that hangs is ended, and says where it was."""
    config = folder / "serve.yaml"
    config.write_text(settings or "{}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    environment.pop("KIMI_MM_API_KEY", None)
    if key is not None:
        (folder / "key").write_text(key + "\n")
        arguments = (*arguments, "--api-key-file", str(folder / "key"))
    command = [sys.executable, "-m", "kimi_mm", "serve", "--model", model, "--port", "0", "--config", str(config)]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, env=environment)
    watchdog = threading.Timer(100, process.send_signal, (signal.SIGABRT,))
    watchdog.daemon = True
    watchdog.start()
    log: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        log.append(line)
        if found := re.search(r"ready at (http://\S+)", line):
            break
    else:
        raise AssertionError(f"the server ended with {process.wait()}: {''.join(log)}")
    watchdog.cancel()
    server = Server(process, found[1], Path(model).name, key, log)
    # A full pipe would stop the server.
    threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True).start()
    return server


def stop(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(30)
    finally:
        server.process.kill()
    assert "Traceback" not in "".join(server.log), "".join(server.log)


@pytest.fixture(scope="session")
def nano(tmp_path_factory) -> Iterator[Server]:
    server = start(tmp_path_factory.mktemp("nano"))
    yield server
    stop(server)


@pytest.fixture(scope="session")
def hearing(ears, tmp_path_factory) -> Iterator[Server]:
    """Serves a model that only hears."""
    server = start(tmp_path_factory.mktemp("hearing"), ears)
    yield server
    stop(server)


@pytest.fixture(scope="session")
def able() -> KimiMM:
    """A tiny untrained model that hears, sees and speaks."""
    torch.manual_seed(1)
    config = ModelConfig.from_yaml(recipes_root() / "models" / "debug-speech.yaml")
    assert config.detokenizer is not None
    # Without a source, whose phase adds up what rounding does to an untrained pitch: batches shall equal rows alone.
    vocoder = config.detokenizer.vocoder.replace(source=False)
    config = config.replace(detokenizer=config.detokenizer.replace(vocoder=vocoder))
    eyes = EYES.replace(output_size=config.backbone.hidden_size)
    model = Model(config.replace(name="able", vision=eyes))
    assert model.vision is not None
    shaken(model.vision)
    shaken(model.backbone, seed=1)
    tokenizer = TextTokenizer.train(["What is in the image? a video of 0123456789:. red dogs"] * 9, 384)
    # Of random ids, most would be halves of characters or nothing at all; letters shall win.
    table = model.backbone.embed_tokens.weight
    count = config.vocab.num_text_tokens
    silent = [i for i in range(count) if not tokenizer.decode([i]).isascii() or not tokenizer.decode([i]).isprintable()]
    with torch.no_grad():
        table[[*silent, *range(len(tokenizer), count), config.vocab.special("text_eos")]] *= 0.1
    return KimiMM(model, tokenizer)


@pytest.fixture(scope="session")
def tiny(able, tmp_path_factory) -> Iterator[Server]:
    """Serves `able`, with a key and small limits."""
    folder = tmp_path_factory.mktemp("tiny")
    save_checkpoint(folder / "able", able.model, able.processor.tokenizer, weights="fp32")
    settings = "{max_body_mib: 1, header_seconds: 1.5, body_seconds: 1.5, read_seconds: 1.5, max_audio_seconds: 60}"
    server = start(folder, str(folder / "able"), KEY, settings)
    yield server
    stop(server)


@pytest.fixture
def started(tmp_path) -> Iterator[Callable[..., Server]]:
    """Returns `started(settings, *arguments)`: a server of this test's own."""
    servers: list[Server] = []

    def begin(model: str = "nano", settings: str = "", *arguments: str) -> Server:
        servers.append(start(tmp_path, model, None, settings, *arguments))
        return servers[-1]

    yield begin
    for server in servers:
        if server.process.poll() is None:
            stop(server)
