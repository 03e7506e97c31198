"""Stages on documents: packed rows equal documents alone, tuning learns, frozen parts stay, bad data stops a run."""

import json
import shutil

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from kimi_mm.checkpoint import load_checkpoint
from kimi_mm.config import ConfigError, ModelConfig
from kimi_mm.data.audio_cache import AudioCache
from kimi_mm.data.debug import write_debug_conversations
from kimi_mm.data.document_config import DataSourceConfig, DocumentDataConfig
from kimi_mm.data.document_loader import collate
from kimi_mm.data.document_sources import open_sources
from kimi_mm.data.documents import DocumentMaker
from kimi_mm.data.rows import open_rows
from kimi_mm.errors import UserError
from kimi_mm.model import Model
from kimi_mm.processing import Processor
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.document_objective import DocumentObjective
from kimi_mm.training.recipe import Recipe, recipes_root
from kimi_mm.training.run import train
from kimi_mm.vision.processing import VisionProcessor

CLIP = recipes_root().parent / "kimi_mm" / "pretrained" / "demo" / "vm-nobox.flac"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny model with ears and eyes, and ten conversations laid out for it."""
    folder = tmp_path_factory.mktemp("documents")
    talk = write_debug_conversations(folder, count=10)
    config = ModelConfig.from_yaml(recipes_root() / "models" / "debug-vision.yaml")
    torch.manual_seed(0)
    model = Model(config)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    tokenizer = TextTokenizer.train(["say one two three red green blue left right stop go"] * 9, 384)
    processor = Processor(config.vocab, tokenizer, VisionProcessor(config.vision), config.audio_delay)
    maker = DocumentMaker(processor, AudioCache(folder / "cache", model.audio.eval()))
    rows = open_rows(talk)
    return model, maker, [maker.make(rows[i]) for i in range(len(rows))]


def run(objective, batch):
    """Hidden states, loss times labels, and all gradients of it."""
    objective.zero_grad()
    hidden = objective._model[0](batch.inputs).text_hidden
    loss = objective(batch)["loss"] * len(batch.labels)
    loss.backward()
    return (
        hidden.detach(),
        loss.detach(),
        {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None},
    )


def test_packed_documents_do_not_see_each_other(parts):
    """Outputs and gradients of a packed row equal those of its documents alone; fp32, 1e-5."""
    model, maker, documents = parts
    assert {document.group for document in documents} == {"text", "audio", "image"}
    objective = DocumentObjective(model, Recipe(stage="sft", model="x", label_smoothing=0.0)).eval()
    hidden, loss, gradients = run(objective, collate(documents, maker.processor, pack=True))
    alone = [run(objective, collate([document], maker.processor, pack=True)) for document in documents]
    torch.testing.assert_close(hidden, torch.cat([each[0] for each in alone], 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, sum(each[1] for each in alone), rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        want = sum(each[2].get(name, torch.zeros_like(gradient)) for each in alone)
        error = (gradient - want).norm() / want.norm().clamp_min(1e-3)
        assert error < 1e-5, (name, float(error))
    padded = run(objective, collate(documents, maker.processor, pack=False))
    torch.testing.assert_close(padded[1], loss, rtol=1e-5, atol=1e-5)


def test_a_document_does_not_move_what_comes_after_it(parts):
    """The gradient of one document's loss with respect to all others' embeddings is exactly zero."""
    model, maker, documents = parts
    batch = collate(documents[:4], maker.processor, pack=True)
    x = model.embed(batch.inputs).detach().requires_grad_()
    hidden = model.backbone(x, cu_seqlens=batch.inputs.cu_seqlens).text_hidden
    start, end = batch.inputs.cu_seqlens[2:4].tolist()
    hidden[:, start:end].square().sum().backward()
    assert x.grad[:, start:end].abs().sum() > 0
    assert not x.grad[:, :start].any()
    assert not x.grad[:, end:].any()


@pytest.fixture(scope="module")
def six_lines(tmp_path_factory):
    """Text, a shipped recording and a picture drawn here, as users bring them."""
    folder = tmp_path_factory.mktemp("mine")
    shutil.copy(CLIP, folder / "clip.flac")
    picture = Image.new("RGB", (84, 56), (250, 250, 250))
    ImageDraw.Draw(picture).ellipse((20, 10, 60, 50), fill=(220, 30, 30))
    picture.save(folder / "ball.png")
    heard = {"type": "audio", "audio": "clip.flac"}
    seen = {"type": "image_url", "image_url": {"url": "ball.png"}}
    turns = [
        ("one", "two"),
        ("left", "right"),
        ([heard], "Please leave no message."),
        ([heard, {"type": "text", "text": "Is it speech?"}], "Yes."),
        ([seen, {"type": "text", "text": "What is it?"}], "A red ball."),
        ([seen, {"type": "text", "text": "Which color?"}], "Red."),
    ]
    lines = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    path = folder / "my.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


LONGER = ["steps=40", "save_every=40", "log_every=1", "optim.lr=5e-3", "optim.warmup_steps=4"]


@pytest.fixture(scope="module")
def tuned(six_lines, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "sft"
    first = train("sft/nano", debug=True, output=output / "a", overrides=["steps=1"], data=[six_lines])
    return first, train("sft/nano", debug=True, output=output / "b", overrides=LONGER, data=[six_lines]), output / "b"


def test_fine_tuning_on_six_lines_lowers_every_loss(tuned):
    first, last, output = tuned
    assert last["loss"] < 0.5 * first["loss"]
    assert last["tokens_per_second"] > 0
    model, _ = load_checkpoint(output / "model")
    assert model.vision is not None


def test_recordings_are_heard_once(tuned, six_lines, tmp_path):
    _, _, output = tuned
    cached = list((output / "cache").rglob("*.safetensors"))
    assert len(cached) == 1  # one recording, used twice
    stamp = cached[0].stat().st_mtime_ns
    train(
        "sft/nano",
        debug=True,
        output=tmp_path,
        overrides=["steps=1", f"data.cache={output / 'cache'}"],
        data=[six_lines],
    )
    assert cached[0].stat().st_mtime_ns == stamp


@pytest.mark.parametrize("pack", ["true", "false"])
def test_resumed_run_equals_uninterrupted_run(six_lines, tmp_path, pack):
    chosen = [f"data.pack={pack}", "data.batch_positions=120"]
    whole = train("sft/nano", debug=True, output=tmp_path / "whole", overrides=chosen, data=[six_lines])
    train("sft/nano", debug=True, output=tmp_path / "cut", overrides=[*chosen, "stop_after=2"], data=[six_lines])
    resumed = train("sft/nano", debug=True, output=tmp_path / "cut", overrides=chosen, data=[six_lines])
    for clock in ("seconds_per_step", "tokens_per_second"):
        whole.pop(clock), resumed.pop(clock)
    assert resumed == whole
    a, b = (load_file(tmp_path / run / "step-0000004" / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def changed(output, names):
    """Whether any weight of a part differs between the start and the end of a run."""
    start, end = (load_checkpoint(output / run / "model")[0].state_dict() for run in ("start", "end"))
    return {name: any(not torch.equal(start[k], end[k]) for k in start if k.startswith(name)) for name in names}


PARTS = ("audio.", "vision.", "backbone.trunk", "backbone.text", "backbone.embed_tokens", "backbone.adaptor")


@pytest.mark.parametrize(
    ("overrides", "moved"),
    [
        (["freeze=[vision, trunk, embed]"], {"backbone.text", "backbone.adaptor"}),
        (["lora={rank: 4}", "freeze=[vision]"], {"backbone.trunk", "backbone.text"}),
        ([], {"vision.", "backbone.trunk", "backbone.text", "backbone.embed_tokens", "backbone.adaptor"}),
    ],
)
def test_only_what_may_learn_moves(six_lines, tmp_path, overrides, moved):
    common = ["weights=fp32", "optim.lr=1e-2", "data.batch_positions=400"]
    train(
        "sft/nano",
        debug=True,
        output=tmp_path / "start",
        overrides=[*common, "steps=1", "optim.lr=0.0"],
        data=[six_lines],
    )
    begin = [f"init={tmp_path / 'start' / 'model'}"]
    train("sft/nano", debug=True, output=tmp_path / "end", overrides=[*common, *begin, *overrides], data=[six_lines])
    assert {name for name, value in changed(tmp_path, PARTS).items() if value} == moved


def test_bad_lines_stop_a_run_before_it_starts(six_lines, tmp_path):
    data = tmp_path / "my.jsonl"
    data.write_text(
        "{\n" + json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    )
    output = tmp_path / "run"
    with pytest.raises(UserError, match=r"my\.jsonl:1: not valid JSON"):
        train("sft/nano", debug=True, output=output, data=[data])
    assert json.loads((output / "bad-lines.jsonl").read_text())["line"] == 1
    assert not list(output.glob("step-*"))
    left = train("sft/nano", debug=True, output=output, data=[data], overrides=["data.skip_bad=true"])
    assert left["text"] > 0
    with pytest.raises(ConfigError, match="not 'asr'"):
        train("asr/nano", debug=True, output=output, data=[data])
    with pytest.raises(ConfigError, match="'wheels' is not a part"):
        train("sft/nano", debug=True, output=output, data=[six_lines], overrides=["freeze=[wheels]"])
    with pytest.raises(ConfigError, match="name the files"):
        train("sft/nano", debug=True, output=output, overrides=["data.sources=[]"])


def test_a_model_without_eyes_says_so_line_by_line(six_lines, tmp_path):
    config = DocumentDataConfig(sources=(DataSourceConfig(files=(str(six_lines),)),))
    tokenizer = TextTokenizer.train(["one two"] * 9, 384)
    model = ModelConfig.from_yaml(recipes_root() / "models" / "debug.yaml")
    maker = DocumentMaker(Processor(model.vocab, tokenizer), AudioCache(tmp_path, Model(model).audio.eval()))
    sources, report = open_sources(config, maker)
    assert [problem.line for problem in report.problems] == [5, 6]
    assert "no eyes" in report.problems[0].reason
    assert len(sources[0].index) == 4
