"""Published -> ours -> published is bit-identical, key for key; bad input is named; a stopped run goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kimi_mm.cli.main import app
from kimi_mm.conversion.convert import convert
from kimi_mm.conversion.files import JOURNAL, verify
from kimi_mm.conversion.published import folder_entries
from kimi_mm.errors import CheckpointError
from tests.conversion.tiny import KIMI_K25, KIMI_LINEAR, kimi_audio, text_model

GROUPS = ("", "whisper-large-v3", "glm-4-voice-tokenizer")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    (root / "kimi_audio").mkdir()
    return {
        "kimi_audio": kimi_audio(root / "kimi_audio"),
        "kimi_linear": text_model(root / "kimi_linear", KIMI_LINEAR),
        "kimi_k25": text_model(root / "kimi_k25", KIMI_K25, int4=True),
        "kimi_vl": text_model(root / "kimi_vl", KIMI_K25 | {"model_type": "kimi_vl"}),
    }


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a published folder by group and name."""
    tensors = {}
    for group in GROUPS:
        for file in sorted((folder / group).glob("*.safetensors")):
            tensors.update({f"{group}/{name}": tensor for name, tensor in load_file(file).items()})
    for file, top in (("audio_detokenizer", "state_dict"), ("vocoder", "generator")):
        if (folder / file).is_dir():
            state = torch.load(folder / file / "model.pt", weights_only=True)[top]
            tensors.update({f"{file}/{name}": tensor for name, tensor in state.items()})
    return tensors


@pytest.mark.parametrize("name", ["kimi_audio", "kimi_linear", "kimi_k25", "kimi_vl"])
def test_there_and_back(published, name, tmp_path):
    convert(published[name], tmp_path / "ours", keep_unused=True, shard_bytes=50_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "ours" / JOURNAL).exists()
    assert verify(tmp_path / "ours") > 5
    convert(tmp_path / "ours", tmp_path / "back", shard_bytes=80_000)
    want, got = everything(published[name]), everything(tmp_path / "back")
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype, key
        assert got[key].shape == tensor.shape, key
        assert torch.equal(got[key], tensor), key
    for file in published[name].rglob("*"):
        if file.suffix in (".json", ".yaml", ".model") and "index" not in file.name:
            assert (tmp_path / "back" / file.relative_to(published[name])).read_bytes() == file.read_bytes()


def test_unused_tensors_are_left_out(published, tmp_path):
    convert(published["kimi_audio"], tmp_path / "ours")
    names = {entry.name for entry in folder_entries(tmp_path / "ours")}
    assert not any("decoder" in name for name in names)
    assert "published:glm-4-voice-tokenizer/ema_count" in names
    assert "published:audio_detokenizer/resampler.kernel" in names


def test_a_stopped_run_goes_on(published, tmp_path):
    """Killed for want of room in the middle of a shard: what was finished is kept, nothing half-written remains."""
    ours = tmp_path / "ours"
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000));"
        "from kimi_mm.cli.main import run; run(sys.argv[1:])"
    )
    arguments = ["convert", str(published["kimi_linear"]), str(ours), "--shard-gib", "0.00005"]
    # The embedding alone is larger than a file may be here.
    arguments[-1] = "0.001"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert "model-0000" in done.stderr
    assert "at tensor 'backbone." in done.stderr
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(ours.glob("*.tmp"))
    assert not (ours / "config.yaml").exists()
    assert not (ours / "model.safetensors.index.json").exists()
    convert(published["kimi_linear"], ours, shard_bytes=2**20)
    fresh = convert(published["kimi_linear"], tmp_path / "fresh", shard_bytes=2**20)
    assert (ours / "SHA256SUMS").read_text() == (fresh / "SHA256SUMS").read_text()


def test_finished_shards_are_not_written_again(published, tmp_path):
    ours = tmp_path / "ours"
    convert(published["kimi_linear"], ours, shard_bytes=40_000)
    lines = (ours / "SHA256SUMS").read_text().splitlines()
    sums = {line.split("  ")[1]: line.split("  ")[0] for line in lines}
    first = sorted(ours.glob("model-*.safetensors"))[0]
    for file in sorted(ours.glob("model-*.safetensors"))[1:]:
        file.unlink()
    # As the journal of a run that was stopped behind its first shard.
    from kimi_mm.conversion.files import fingerprint
    from kimi_mm.conversion.published import open_published, plan

    mark = fingerprint(plan(open_published(published["kimi_linear"])), "native", 40_000)
    (ours / JOURNAL).write_text(json.dumps({"fingerprint": mark, "done": {first.name: sums[first.name]}}))
    before = first.stat().st_mtime_ns
    convert(published["kimi_linear"], ours, shard_bytes=40_000)
    assert first.stat().st_mtime_ns == before
    assert verify(ours) == len(lines)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(published, tmp_path) -> Path:
    return Path(shutil.copytree(published["kimi_linear"], tmp_path / "broken"))


def refused(folder: Path, tmp_path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        convert(folder, tmp_path / "ours")
    assert not (tmp_path / "ours" / "config.yaml").exists()
    assert not list(tmp_path.glob("ours/*.safetensors*"))
    return str(error.value)


def test_missing_shard(broken, tmp_path):
    (broken / "model-36-of-36.safetensors").unlink()
    message = refused(broken, tmp_path)
    assert "model-36-of-36.safetensors: no such file" in message
    assert "tensors are in it, 'lm_head" in message or "tensors are in it, 'model." in message


def test_truncated_file(broken, tmp_path):
    file = broken / "model-1-of-35.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    message = refused(broken, tmp_path)
    assert "model-1-of-35.safetensors: cut short, tensor 'model." in message
    file.write_bytes(b"\0" * 100)
    assert "model-1-of-35.safetensors: damaged" in refused(broken, tmp_path)


def replaced(folder: Path, change) -> None:
    file = folder / "model-1-of-35.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = {name: file for name, file in index["weight_map"].items() if "36-of-36" in file}
    index["weight_map"] = names | dict.fromkeys(tensors, "model-1-of-35.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_wrong_shape_missing_and_unknown_tensor(broken, tmp_path):
    name = next(iter(sorted(load_file(broken / "model-1-of-35.safetensors"))))
    replaced(broken, lambda tensors: tensors.update({name: torch.zeros(3, 5, dtype=torch.bfloat16)}))
    message = refused(broken, tmp_path)
    assert f"model-1-of-35.safetensors: tensor '{name}' has shape [3, 5], config.json says" in message
    replaced(broken, lambda tensors: tensors.pop(name))
    assert f"tensor '{name}' is missing" in refused(broken, tmp_path)


def test_unknown_tensor(broken, tmp_path):
    replaced(broken, lambda tensors: tensors.update({"model.layers.0.surprise": torch.zeros(2)}))
    assert "model-1-of-35.safetensors: unknown tensor 'model.layers.0.surprise'" in refused(broken, tmp_path)


def test_wrong_architecture(broken, tmp_path):
    config = broken / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    assert "config.json: architecture LlamaForCausalLM (model_type 'llama') is not supported" in refused(
        broken, tmp_path
    )
    values = {k: v for k, v in KIMI_LINEAR.items() if k != "kv_lora_rank"}
    config.write_text(json.dumps(values))
    assert "config.json: lacks 'kv_lora_rank'" in refused(broken, tmp_path)


def test_a_pickle_that_runs_code_is_refused(published, tmp_path):
    folder = Path(shutil.copytree(published["kimi_audio"], tmp_path / "bad"))
    torch.save({"generator": {"x": torch.zeros(2), "y": Path("/")}}, folder / "vocoder/model.pt")
    assert "vocoder/model.pt: damaged, or more than plain tensors" in refused(folder, tmp_path)


def test_a_converted_folder_cannot_name_places_to_write(published, tmp_path):
    convert(published["kimi_linear"], tmp_path / "ours")
    save_file({"published:../evil": torch.zeros(2)}, tmp_path / "ours" / "extra.safetensors")
    index = tmp_path / "ours" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["published:../evil"] = "extra.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"unknown tensor 'published:\.\./evil'"):
        convert(tmp_path / "ours", tmp_path / "out" / "back")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    values["weight_map"]["published:../evil"] = ["extra.safetensors"]
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="not a checkpoint index"):
        convert(tmp_path / "ours", tmp_path / "out" / "back")


def test_missing_audio_tokenizer(published, tmp_path):
    folder = Path(shutil.copytree(published["kimi_audio"], tmp_path / "bad"))
    glm = folder / "glm-4-voice-tokenizer"
    glm.rename(tmp_path / "glm")
    assert "THUDM/glm-4-voice-tokenizer" in refused(folder, tmp_path)
    convert(folder, tmp_path / "ours", audio_tokenizer=tmp_path / "glm")
    assert (tmp_path / "ours/published/glm-4-voice-tokenizer/config.json").is_file()


def test_command_line(published, tmp_path):
    done = CliRunner().invoke(app, ["convert", str(published["kimi_linear"]), str(tmp_path / "ours"), "--check"])
    assert done.exit_code == 0, done.output
    assert "files agree with their checksums" in done.output
    file = next((tmp_path / "ours").glob("model-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="differs from its checksum"):
        verify(tmp_path / "ours")
