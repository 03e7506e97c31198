"""nano as a transformers model: the Auto classes, logits, generate; no remote code."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import kimi_mm
from kimi_mm.audio.io import read_audio
from kimi_mm.checkpoint import PRETRAINED
from kimi_mm.cli.main import app
from kimi_mm.errors import UserError
from kimi_mm.processing import ModelInputs

transformers = pytest.importorskip("transformers")

import kimi_mm.hf  # noqa: E402  (registers)

RECORDING = PRETRAINED / "demo" / "tt-weasels.flac"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    dest = tmp_path_factory.mktemp("hf") / "nano"
    done = CliRunner().invoke(app, ["convert", "nano", str(dest), "--to", "transformers"])
    assert done.exit_code == 0, done.output
    return dest


def test_auto_classes_transcribe(folder):
    """The same words as kimi_mm itself, from a recording in a message."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder)
    assert type(transformers.AutoConfig.from_pretrained(folder)).model_type == "kimi_mm"
    engine = kimi_mm.load()
    wave = read_audio(RECORDING)[0][: 5 * 16_000]
    inputs = processor([{"role": "user", "content": [{"type": "audio", "audio": wave}]}])
    ids = model.generate(**inputs, max_new_tokens=40)
    (want,) = engine._decode([np.asarray(wave)], beams=1)
    assert processor.batch_decode(ids)[0].split()[:4] == engine.processor.tokenizer.decode(want.ids).split()[:4]


def test_logits_and_loss(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 4000, (2, 12))
    output = model(input_ids=ids, labels=ids)
    ours = kimi_mm.load().model
    blank = torch.full_like(ids, ours.config.vocab.special("text_blank"))
    with torch.no_grad():
        hidden = ours(ModelInputs(ids, blank, torch.tensor([12, 12]))).text_hidden
        torch.testing.assert_close(output.logits, ours.backbone.text_logits(hidden), atol=1e-5, rtol=1e-5)
    output.loss.backward()
    assert model.model.backbone.embed_tokens.weight.grad.abs().sum() > 0


def test_padding_on_the_left_is_refused(folder):
    model = transformers.AutoModel.from_pretrained(folder)
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(UserError, match="pad on the right"):
        model(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1]]))
    assert model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 0]])).logits.shape[:2] == (1, 3)


def test_saving(folder, tmp_path):
    model = transformers.AutoModel.from_pretrained(folder, dtype="bfloat16")
    model.save_pretrained(tmp_path)
    transformers.AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for key, tensor in model.state_dict().items():
        if ".ema_" not in key:
            assert torch.equal(again.state_dict()[key], tensor), key
    assert (
        transformers.AutoProcessor.from_pretrained(tmp_path)([{"role": "user", "content": "hi"}]).input_ids.dtype
        == torch.int64
    )


def test_registered_when_transformers_is_open():
    code = (
        "import torch, transformers.models.auto, kimi_mm;"
        "from transformers import AutoConfig; print(AutoConfig.for_model('kimi_mm').model_type)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "kimi_mm", done.stderr


def test_wrong_target(tmp_path):
    done = CliRunner().invoke(app, ["convert", "nano", str(tmp_path / "x"), "--to", "gguf"])
    assert done.exit_code != 0
