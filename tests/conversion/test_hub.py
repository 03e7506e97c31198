"""Repositories of the hub, over real HTTP on loopback: what is fetched, what is not, and everything that can break."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_mm.conversion.convert import convert
from kimi_mm.conversion.hub import GLM_REPOSITORY
from tests.conversion.hub_server import Hub
from tests.conversion.tiny import KIMI_LINEAR, kimi_audio, text_model

pytest.importorskip("huggingface_hub")
PIECE = 10 * 2**20  # huggingface_hub keeps what it got by pieces of this size
SHARDS = ("model-1-of-35.safetensors", "model-36-of-36.safetensors")


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> dict[str, Path]:
    """Published models as they lie on the hub: with Python files and pickles that nobody wants."""
    root = tmp_path_factory.mktemp("hub")
    text_model(root / "linear", KIMI_LINEAR | {"vocab_size": 120_000})  # shards of some 15 MB
    for name in ("modeling_kimi.py", "tokenization_kimi.py", "pytorch_model.bin", "evil.pkl"):
        (root / "linear" / name).write_bytes(b"import os; os.abort()")
    (root / "audio").mkdir()
    kimi_audio(root / "audio")
    (root / "audio" / "glm-4-voice-tokenizer").rename(root / "glm")
    shutil.copytree(root / "linear", root / "short")
    (root / "short" / SHARDS[1]).unlink()
    return {
        "tiny/linear": root / "linear",
        "tiny/audio": root / "audio",
        "tiny/short": root / "short",
        GLM_REPOSITORY: root / "glm",
    }


@pytest.fixture
def hub(repositories):
    with Hub(dict(repositories)) as served:
        yield served


def run(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own, as huggingface_hub reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | settings, capture_output=True, text=True, timeout=120
    )


def converted(hub: Hub, home: Path, name: str, dest: Path) -> subprocess.CompletedProcess[str]:
    return run(hub, home, "-m", "kimi_mm", "convert", name, str(dest))


def blobs(home: Path) -> set[str]:
    return {path.name for path in home.rglob("blobs/*")}


def test_load_and_convert_by_name(hub, repositories, tmp_path):
    """`kimi_mm.load` with the tokenizer's repository beside it, then `convert`; every file is fetched once."""
    code = (
        "import sys, kimi_mm; engine = kimi_mm.load('tiny/audio', dtype='float32');"
        "assert engine.model.detokenizer is not None; print(len(engine.tokenizer.encode([0.1] * 2000)))"
    ).replace("[0.1] * 2000", "__import__('torch').full((2000,), 0.1)")
    done = run(hub, tmp_path / "home", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"
    names = [name for name, _ in hub.fetched()]
    assert {"audio_detokenizer/model.pt", "whisper-large-v3/model.safetensors", "tiktoken.model"} <= set(names)
    assert names.count("model.safetensors") == 1  # of the tokenizer, which is a repository of its own
    before = len(names)
    done = converted(hub, tmp_path / "home", "tiny/audio", tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert len(hub.fetched()) == before
    glm = repositories[GLM_REPOSITORY]
    here = convert(repositories["tiny/audio"], tmp_path / "here", audio_tokenizer=glm)
    sums = [sorted(line for line in (p / "SHA256SUMS").read_text().splitlines()) for p in (tmp_path / "ours", here)]
    assert sums[0] == sums[1]


def test_a_broken_download_goes_on(hub, repositories, tmp_path):
    """Where a connection broke; over two runs, where the server was gone in between, behind the last whole file."""
    home = tmp_path / "home"
    assert all((repositories["tiny/linear"] / name).stat().st_size > PIECE + 2**20 for name in SHARDS)
    hub.cut = {f"tiny/linear/{name}": PIECE + 2**20 for name in SHARDS}
    hub.gone_after = f"tiny/linear/{SHARDS[1]}"
    done = converted(hub, home, "tiny/linear", tmp_path / "ours")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("kimi-mm: 'tiny/linear' cannot be downloaded (")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ours").exists()
    assert [span for name, span in hub.fetched() if name == SHARDS[0]] == ["", f"bytes={PIECE}-"]
    hub.gone_after = ""
    hub.requests.clear()
    done = converted(hub, home, "tiny/linear", tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert [name for name, _ in hub.fetched()] == [SHARDS[1]]


def test_a_file_that_differs_from_its_checksum(hub, tmp_path):
    """It alone is fetched again; of what lies on the hub, nothing that could run is fetched at all."""
    home = tmp_path / "home"
    hub.flip.add(f"tiny/linear/{SHARDS[0]}")
    done = converted(hub, home, "tiny/linear", tmp_path / "ours")
    assert done.returncode == 1
    assert f"'tiny/linear': {SHARDS[0]} differs from its checksum on the hub and was removed" in done.stderr
    assert not (tmp_path / "ours").exists()
    names = {name for name, _ in hub.fetched()} | {name for name, _ in hub.fetched("HEAD")}
    assert {Path(name).suffix for name in names} == {".json", ".safetensors", ".model"}
    hub.requests.clear()
    done = converted(hub, home, "tiny/linear", tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert [name for name, _ in hub.fetched()] == [SHARDS[0]]
    assert not list(home.rglob("*.py"))
    (listed,) = home.rglob("kimi-mm-verified.json")
    assert set(json.loads(listed.read_text())) == blobs(home)


def test_missing_shards_and_repositories(hub, tmp_path):
    done = converted(hub, tmp_path / "home", "tiny/short", tmp_path / "ours")
    assert done.returncode == 1
    assert f"{SHARDS[1]}: no such file; " in done.stderr
    assert "tensors are in it" in done.stderr
    done = run(hub, tmp_path / "home", "-m", "kimi_mm", "convert", "tiny/none", str(tmp_path / "ours"))
    assert done.returncode == 1
    assert done.stderr.startswith("kimi-mm: 'tiny/none' cannot be downloaded (")
    assert done.stderr.strip().count("\n") == 0
    assert not (tmp_path / "ours").exists()
