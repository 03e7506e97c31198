"""Published models through the recipes and back: labels, what learns, what stays bit for bit, reloading, resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import kimi_mm
from kimi_mm.cli.main import app
from kimi_mm.config import ConfigError
from kimi_mm.conversion.convert import convert
from kimi_mm.conversion.presets import KIMI_AUDIO_VOCAB
from kimi_mm.data.debug import write_debug_chat, write_debug_turns
from kimi_mm.errors import CheckpointError, UserError
from kimi_mm.processing import IGNORE, AudioClip, ModelInputs
from kimi_mm.processing_published import KimiAudioProcessor
from kimi_mm.text.tiktoken import TiktokenTokenizer
from kimi_mm.training.run import train
from tests.conversion.test_convert import everything
from tests.conversion.test_parity import qwen2
from tests.conversion.tiny import KIMI_K25, KIMI_LINEAR, kimi_audio, text_model, write_vocabulary

IDS = {"vocab_size": 163_840, "eos_token_id": 163_586}  # the real number, so that the roles have their ids
ROOT = Path(__file__).resolve().parents[2]
QUICK = ["steps=2", "save_every=2", "optim.lr=2e-2", "optim.warmup_steps=0", "data.batch_positions=200"]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tuning")
    for name in ("audio", "chat"):
        (root / name).mkdir()
    return {
        "kimi-audio": kimi_audio(root / "audio"),
        "kimi-linear": text_model(root / "linear", KIMI_LINEAR | IDS),
        "kimi-k25": text_model(root / "k25", KIMI_K25 | {"text_config": KIMI_K25["text_config"] | IDS}, int4=True),
        "turns": write_debug_turns(root, count=4),
        "chat": write_debug_chat(root / "chat", count=4),
    }


def moved(before: Path, after: Path) -> set[str]:
    """Names of tensors that differ in any bit; all else must be the same, key for key and type for type."""
    old, new = everything(before), everything(after)
    names = {name for name in old if name not in new}
    assert all("/model.decoder." in name for name in names), names
    assert new.keys() <= old.keys()
    for name, tensor in new.items():
        assert (tensor.dtype, tensor.shape) == (old[name].dtype, old[name].shape), name
    return {
        name for name, tensor in new.items() if not torch.equal(tensor.view(torch.uint8), old[name].view(torch.uint8))
    }


# ---- labels --------------------------------------------------------------------------------------------------------

START, ASSISTANT, BLANK, EOS = 151670, 151671, 151666, 151667
BEGIN, END, CT, CTD, MSG_END, CODE = 151661, 151663, 151675, 151676, 151645, 152064


def labelled(ids: list[int], labels: list[int]) -> list[int]:
    """What of a stream is learnt, at the place where it stands; each must be the label of the position before it."""
    found = [IGNORE] * len(ids)
    for at, label in enumerate(labels):
        if label != IGNORE:
            assert ids[at + 1] == label
            found[at + 1] = label
    return found


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> KimiAudioProcessor:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder, extra=0)
    return KimiAudioProcessor(KIMI_AUDIO_VOCAB, TiktokenTokenizer.from_folder(folder, "qwen"), audio_delay=6)


def laid(processor: KimiAudioProcessor, messages: list[dict], clips: list[AudioClip], output: str) -> ModelInputs:
    streams = processor.streams(messages, output=output, add_assistant_start=False)
    return processor.collate([streams], [clips])


def heard(*codes: int) -> AudioClip:
    return AudioClip(torch.tensor(codes), torch.ones(len(codes), 4))


def test_labels_of_speech_recognition(processor):
    """Loss on the text of the assistant and its text_eos, on nothing else; several recordings in one turn."""
    user = [{"type": "text", "text": "a"}, {"type": "audio", "num_codes": 2}, {"type": "audio", "num_codes": 1}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": "bc"}]
    inputs = laid(processor, messages, [heard(3, 4), heard(5)], "text")
    audio, text = inputs.audio_ids[0].tolist(), inputs.text_ids[0].tolist()
    media = [BEGIN, CODE + 3, CODE + 4, END, BEGIN, CODE + 5, END]
    assert audio == [START, BLANK, *media, CT, MSG_END, ASSISTANT, BLANK, BLANK, BLANK, MSG_END]
    assert text == [BLANK, 97, *[BLANK] * 7, BLANK, BLANK, BLANK, 98, 99, EOS, BLANK]
    assert labelled(text, inputs.text_labels[0].tolist()) == [IGNORE] * 12 + [98, 99, EOS, IGNORE]
    assert set(inputs.audio_labels[0].tolist()) == {IGNORE}
    assert inputs.feature_mask[0].nonzero()[:, 0].tolist() == [3, 4, 7]


def test_labels_of_speech_to_speech(processor):
    """Both streams of every spoken answer: text and text_eos, and six blanks later codes and what ends them."""
    user = {"role": "user", "content": [{"type": "audio", "num_codes": 1}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "hi"}, {"type": "audio", "num_codes": 2}]}
    clips = [heard(1), AudioClip(torch.tensor([7, 8])), heard(2), AudioClip(torch.tensor([9, 6]))]
    inputs = laid(processor, [user, said, user, said], clips, "speech")
    audio, text = inputs.audio_ids[0].tolist(), inputs.text_ids[0].tolist()
    turn = lambda code: [START, BEGIN, CODE + code, END, CTD, MSG_END, ASSISTANT]  # noqa: E731
    answer = lambda *codes: [BLANK] * 6 + [CODE + code for code in codes] + [MSG_END]  # noqa: E731
    assert audio == [*turn(1), *answer(7, 8), *turn(2), *answer(9, 6)]
    spoken = [104, 105, EOS, *[BLANK] * 6]
    assert text == ([BLANK] * 7 + spoken) * 2
    assert labelled(text, inputs.text_labels[0].tolist()) == ([IGNORE] * 7 + spoken[:3] + [IGNORE] * 6) * 2
    codes = [[IGNORE] * 13 + [CODE + a, CODE + b, MSG_END] for a, b in ((7, 8), (9, 6))]
    assert labelled(audio, inputs.audio_labels[0].tolist()) == [*codes[0], *codes[1]]
    assert inputs.feature_mask[0].nonzero()[:, 0].tolist() == [2, 18]  # what the assistant says has none


# ---- Kimi-Audio ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(places, tmp_path_factory) -> Path:
    """By the command line: LoRA, the weights as narrow as they were published."""
    run = tmp_path_factory.mktemp("runs") / "lora"
    arguments = ["train", "sft/kimi-audio", "--debug", "--model", str(places["kimi-audio"]), "-o", str(run)]
    arguments += ["--data", str(places["turns"]), *QUICK, "precision=bf16", "steps=3"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return run


def test_adapters_merge_into_the_published_layout(places, tuned, tmp_path):
    done = CliRunner().invoke(app, ["convert", str(tuned), str(tmp_path / "back"), "--to", "kimi-audio", "--check"])
    assert done.exit_code == 0, done.output
    names = moved(places["kimi-audio"], tmp_path / "back")
    assert all(
        name.startswith("/model.") and name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj") for name in names
    )
    assert len(names) == 4 * 7  # in trunk and both branches, since both streams were learnt
    logits = []
    ids = torch.randint(0, 720, (2, 1, 30), generator=torch.Generator().manual_seed(0))
    for folder in (tuned / "model", tmp_path / "back"):
        model = kimi_mm.load(folder, dtype=torch.float64).model
        assert model.detokenizer is not None
        with torch.no_grad():
            output = model(ModelInputs(ids[0], ids[1], torch.tensor([30])))
            logits.append(
                (model.backbone.text_logits(output.text_hidden), model.backbone.audio_logits(output.audio_hidden))
            )
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))
    state = {k: v for file in (tmp_path / "back").glob("*.safetensors") for k, v in load_file(file).items()}
    layers = [f"model.layers.{i}." for i in range(5)]
    theirs = qwen2(state, layers, "model.norm.weight", "lm_head.weight").double()
    table = state["model.embed_tokens.weight"].double()
    with torch.no_grad():
        want = theirs(inputs_embeds=table[ids[0]] + table[ids[1]]).logits
    torch.testing.assert_close(logits[0][0], want, atol=1e-6, rtol=1e-6)


def test_checkpoints_hold_what_learns(tuned):
    state = load_file(tuned / "step-0000003" / "model.safetensors")
    assert state
    assert all("lora_" in name for name in state if "router" not in name)


ALL = ["lora=null", "freeze=[]"]
PARTS = {
    "trunk": ("/model.layers.0.", "/model.layers.1.", "/model.layers.2."),
    "text": ("/model.layers.3.", "/model.layers.4.", "/model.norm.", "/lm_head."),
    "speech": ("/model.mimo_layers.", "/model.mimo_norm.", "/mimo_output."),
    "embed": ("/model.embed_tokens.",),
    "adaptor": ("/model.vq_adaptor.",),
    "features": ("whisper-large-v3/",),
}


@pytest.mark.parametrize("frozen", [[], ["features", "trunk", "embed"], ["text", "speech", "adaptor"]])
def test_any_part_may_learn_or_stay(places, tmp_path, frozen):
    """The optimiser moves exactly the parts that are not frozen; the encoder of codes and the voice never move."""
    chosen = [*QUICK, "lora=null", f"freeze=[{', '.join(frozen)}]"]
    train(
        "sft/kimi-audio",
        debug=True,
        output=tmp_path,
        overrides=chosen,
        data=[places["turns"]],
        model=places["kimi-audio"],
    )
    names = moved(places["kimi-audio"], convert(tmp_path, tmp_path / "back"))
    for part, beginnings in PARTS.items():
        assert any(name.startswith(beginnings) for name in names) == (part not in frozen), part
    assert all(name.startswith(tuple(b for part in PARTS.values() for b in part)) for name in names)


def test_features_that_learn_are_those_that_were_kept(places, tmp_path):
    """Hearing in the step, segments and all, places the rows where the cached features stand; they get gradients."""
    from kimi_mm.data.audio_cache import AudioCache
    from kimi_mm.data.document_loader import collate
    from kimi_mm.data.documents import DocumentMaker
    from kimi_mm.data.rows import open_rows

    engine = kimi_mm.load(places["kimi-audio"], dtype="float32")
    maker = DocumentMaker(engine.processor, AudioCache(tmp_path, engine.tokenizer, segments=True), speaks=True)
    rows = open_rows(places["turns"])
    for pack in (True, False):
        inputs = collate([maker.make(rows[i]) for i in range(4)], engine.processor, pack).inputs
        rows_heard = engine.model.hear(inputs)
        assert rows_heard.requires_grad
        torch.testing.assert_close(
            rows_heard[inputs.feature_mask], inputs.features[inputs.feature_mask], atol=2e-3, rtol=2e-3
        )
        assert not rows_heard[~inputs.feature_mask].any()
    long = engine.tokenizer.segments(torch.zeros(480_001))
    assert long.shape == (2, 480_000)


def test_resumed_run_equals_uninterrupted_run(places, tmp_path):
    """From a converted model, whose frozen weights the checkpoints leave out."""
    ours = convert(places["kimi-audio"], tmp_path / "ours")
    chosen = {"debug": True, "data": [places["turns"]], "model": ours}
    common = [*QUICK, "steps=4"]
    train("sft/kimi-audio", output=tmp_path / "whole", overrides=common, **chosen)
    train("sft/kimi-audio", output=tmp_path / "cut", overrides=[*common, "stop_after=2"], **chosen)
    train("sft/kimi-audio", output=tmp_path / "cut", overrides=common, **chosen)
    whole, cut = (everything(convert(tmp_path / run, tmp_path / f"{run}-back")) for run in ("whole", "cut"))
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


# ---- text models ---------------------------------------------------------------------------------------------------


def test_kimi_linear_reloads_in_transformers(places, tmp_path):
    """Trained whole, router biases too; what is merged back gives transformers the logits that it gives us."""
    transformers = pytest.importorskip("transformers")
    from tests.text.test_parity import _kimi_linear
    from tests.vision.tiny import shaken

    torch.manual_seed(0)
    shaken(_kimi_linear(**IDS)).save_pretrained(tmp_path / "saved")
    write_vocabulary(tmp_path / "saved")
    convert(
        convert(tmp_path / "saved", tmp_path / "ours"), tmp_path / "published"
    )  # transformers spells three names so
    chosen = {"data": [places["chat"]], "model": tmp_path / "published"}
    train("sft/kimi-linear", debug=True, output=tmp_path / "run", overrides=[*QUICK, "lora=null"], **chosen)
    names = moved(tmp_path / "published", convert(tmp_path / "run", tmp_path / "back"))
    assert any("bias" in name and "moe" in name for name in names), names
    assert len(names) > 50
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float64).eval()
    theirs.config._experts_implementation = "eager"
    ours = kimi_mm.load(tmp_path / "back", dtype="float64")
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(ids).logits
        got = ours.model.backbone.text_logits(ours.model(ModelInputs(ids, ids, torch.tensor([40]))).text_hidden)
    assert want.std() > 0.05
    torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-6)


@pytest.mark.parametrize("lora", [True, False])
def test_four_bit_experts(places, tmp_path, lora):
    """Experts that stay keep their packed bytes; those that learn are rounded to four bits anew."""
    chosen = [*QUICK, *([] if lora else ["lora=null"])]
    train(
        "sft/kimi-linear",
        debug=True,
        output=tmp_path,
        overrides=chosen,
        data=[places["chat"]],
        model=places["kimi-k25"],
    )
    names = moved(places["kimi-k25"], convert(tmp_path, tmp_path / "back", to="kimi-k25"))
    packed = {name for name in names if name.endswith(("_packed", "_scale"))}
    assert bool(packed) != lora
    assert not any(name.endswith("_shape") for name in names)
    assert any("self_attn" in name for name in names)
    kimi_mm.load(tmp_path / "back", weights="int8")


@pytest.mark.slow
def test_two_processes_leave_what_they_did_not_train(places, tmp_path):
    """FSDP2 gathers the whole model in fp32; frozen experts are written from their four bits all the same."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kimi_mm"]
    command += ["train", "sft/kimi-linear", "--debug", "--model", str(places["kimi-k25"]), "-o", str(tmp_path / "run")]
    command += ["--data", str(places["chat"]), *QUICK, "gradient_accumulation=2", "parallel.data=fsdp"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    names = moved(places["kimi-k25"], convert(tmp_path / "run", tmp_path / "back"))
    kinds = {name.split(".")[-2] for name in names}
    assert kinds == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


# ---- bad input -----------------------------------------------------------------------------------------------------


def refused(places, tmp_path, row: dict, model: str = "kimi-audio") -> str:
    data = places["turns"].parent / "bad.jsonl"
    data.write_text(json.dumps(row) + "\n")
    recipe = "sft/kimi-audio" if model == "kimi-audio" else "sft/kimi-linear"
    with pytest.raises(UserError) as error:
        train(recipe, debug=True, output=tmp_path / "run", data=[data], model=places[model])
    assert not list((tmp_path / "run").glob("step-*"))
    assert not (tmp_path / "run" / "model").exists()
    return str(error.value)


def test_bad_data_is_named_before_any_weight_is_read(places, tmp_path):
    answer = {"role": "assistant", "content": "one"}
    bad = {"messages": [{"role": "system", "content": "x"}, answer]}
    assert "bad.jsonl:1: message 0: role 'system' must be one of user, assistant" in refused(places, tmp_path, bad)
    sound = {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "one.wav"}]}, answer]}
    assert "does not hear" in refused(places, tmp_path, sound, "kimi-linear")
    gone = {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "none.wav"}]}, answer]}
    assert "'none.wav' is not a file" in refused(places, tmp_path, gone)


def test_bad_starts_and_ways_back(places, tuned, tmp_path):
    common = {"debug": True, "output": tmp_path / "run", "data": [places["turns"]]}
    with pytest.raises(CheckpointError, match="neither a folder nor a repository"):
        train("sft/kimi-audio", model=tmp_path / "nothing", **common)
    with pytest.raises(ConfigError, match="trained by the stages pretrain and sft only, not 'text'"):
        train("text/nano", output=tmp_path / "run", model=places["kimi-audio"])
    with pytest.raises(ConfigError, match="'vision' is not a part of this model; it has audio, features, embed"):
        train("sft/kimi-audio", model=places["kimi-audio"], overrides=["freeze=[vision]"], **common)
    with pytest.raises(CheckpointError, match="goes back to the layout 'kimi-audio', not to 'kimi-linear'"):
        convert(tuned, tmp_path / "back", to="kimi-linear")
    with pytest.raises(CheckpointError, match="is published already"):
        convert(places["kimi-audio"], tmp_path / "back", to="kimi-audio")
    assert not (tmp_path / "back").exists()
