"""Every recipe at debug size, the chain of stages, and resuming: the same losses as a run never interrupted."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_mm.checkpoint import load_checkpoint
from kimi_mm.config import ConfigError
from kimi_mm.errors import CheckpointError
from kimi_mm.training.recipe import recipes_root
from kimi_mm.training.run import train

RECIPES = sorted(
    f"{p.parent.name}/{p.stem}" for p in recipes_root().glob("*/*.yaml") if p.parent.name not in ("models", "chains")
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_at_debug_size(recipe, tmp_path):
    numbers = train(recipe, debug=True, output=tmp_path)
    assert 0 < numbers["loss"] < 100
    model, tokenizer = load_checkpoint(tmp_path / "model")
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 4
    assert len(tokenizer) <= model.config.vocab.num_text_tokens
    assert list(tmp_path.glob("tensorboard/events*"))


@pytest.mark.parametrize(
    ("recipe", "optimizer"),
    [("asr/nano", "adamw"), ("tokenizer/nano", "adamw"), ("text/nano", "muonclip"), ("speech/nano", "adamw")],
)
def test_resumed_run_equals_uninterrupted_run(recipe, optimizer, tmp_path):
    chosen = [f"optim.optimizer={optimizer}"]
    whole = train(recipe, debug=True, output=tmp_path / "whole", overrides=chosen)
    # Stops after step 2 as a killed run would, with the schedule of the full run.
    train(recipe, debug=True, output=tmp_path / "cut", overrides=[*chosen, "stop_after=2"])
    resumed = train(recipe, debug=True, output=tmp_path / "cut", overrides=chosen)
    assert ("qk_max" in whole) == (optimizer == "muonclip")
    whole, resumed = ({k: v for k, v in numbers.items() if "second" not in k} for numbers in (whole, resumed))
    assert resumed == whole
    last = "step-0000004/model.safetensors"
    a, b = load_file(tmp_path / "whole" / last), load_file(tmp_path / "cut" / last)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_stages_chain(tmp_path):
    train("text/nano", debug=True, output=tmp_path / "text")
    model = str(tmp_path / "text" / "model")
    train("tokenizer/nano", debug=True, output=tmp_path / "tok", overrides=[f"tokenizer={model}/tokenizer.json"])
    overrides = [f"init={model}", f"init_audio={tmp_path / 'tok' / 'model'}"]
    train("asr/nano", debug=True, output=tmp_path / "asr", overrides=overrides)
    heard, _ = load_checkpoint(tmp_path / "tok" / "model")
    final, _ = load_checkpoint(tmp_path / "asr" / "model")
    for name, tensor in heard.audio.state_dict().items():  # the tokenizer came through untouched
        assert torch.equal(tensor, final.audio.state_dict()[name]), name


def test_learning_happens(tmp_path):
    first = train("text/nano", debug=True, output=tmp_path / "a", overrides=["steps=1", "log_every=1"])
    longer = ["steps=80", "save_every=80", "optim.warmup_steps=5"]
    later = train("text/nano", debug=True, output=tmp_path / "b", overrides=longer)
    assert later["text"] < 0.8 * first["text"]


def test_bad_starts_are_refused_before_training(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        train("asr/nano", debug=True, output=tmp_path, overrides=["init=/nowhere/model"])
    with pytest.raises(CheckpointError, match="no speech shards"):
        train("asr/nano", debug=True, output=tmp_path, overrides=[f"speech.folders=[{tmp_path}]"])
    with pytest.raises(CheckpointError, match="not the encoder"):
        train("tokenizer/nano", debug=True, output=tmp_path, overrides=["whisper=/nowhere.safetensors"])
    with pytest.raises(ConfigError, match="stage='sing'"):
        train("asr/nano", debug=True, output=tmp_path, overrides=["stage=sing"])


def test_damaged_state_is_named(tmp_path):
    train("text/nano", debug=True, output=tmp_path)
    state = tmp_path / "step-0000004" / "model.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"step-0000004.*damaged"):
        train("text/nano", debug=True, output=tmp_path, overrides=["steps=6"])


def test_states_that_do_not_fit_are_refused_in_a_sentence(tmp_path):
    train("text/nano", debug=True, output=tmp_path, overrides=["steps=1"])
    longer = {"debug": True, "output": tmp_path}
    with pytest.raises(CheckpointError, match="another optimiser"):
        train("text/nano", **longer, overrides=["steps=2", "optim.optimizer=muonclip"])
    weights = tmp_path / "step-0000001" / "model.safetensors"
    tensors = load_file(weights)
    name = min(tensors)
    save_file({**tensors, name: torch.zeros(3, 3, 3)}, weights)
    with pytest.raises(CheckpointError, match=r"does not fit this recipe's model.*--no-resume"):
        train("text/nano", **longer, overrides=["steps=2"])
    save_file(tensors, weights)
    for damage in (b"not a pickle at all", b""):
        (tmp_path / "step-0000001" / "training.pt").write_bytes(damage)
        with pytest.raises(CheckpointError, match="step-0000001: damaged"):
            train("text/nano", **longer, overrides=["steps=2"])


@pytest.mark.parametrize("seed", [2**32 - 1, 2**62])
def test_any_seed_trains(seed, tmp_path):
    assert train("text/nano", debug=True, output=tmp_path, overrides=["steps=1", f"seed={seed}"])["loss"] > 0


def test_a_negative_seed_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="seed=-1"):
        train("text/nano", debug=True, output=tmp_path, overrides=["seed=-1"])


def test_parts_that_a_recipe_has_no_use_for_are_left_behind(tmp_path, caplog):
    """A model with eyes and a voice goes on as one that only hears."""
    caplog.set_level("INFO")
    short = ["steps=1", "weights=fp32"]
    train("joint/nano", debug=True, output=tmp_path / "all", overrides=short)
    start = tmp_path / "all" / "model"
    train("asr/nano", debug=True, output=tmp_path / "ears", overrides=[*short, f"init={start}", "init_audio="])
    assert "has no backbone.audio., detokenizer., vision., which are left out" in caplog.text
    config = load_checkpoint(tmp_path / "ears" / "model")[0].config
    assert (config.vision, config.detokenizer, config.backbone.audio_head) == (None, None, False)
