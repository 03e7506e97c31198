"""Chains of stages: nano v1 rehearsed from nothing at debug size, the clock over several starts, what is refused."""

import json
import shutil
import sys
import time

import pytest
import torch
import yaml
from PIL import Image

import kimi_mm
from kimi_mm.checkpoint import load_checkpoint
from kimi_mm.cli.main import run as cli
from kimi_mm.config import ConfigError
from kimi_mm.data.debug import write_debug_art, write_debug_data
from kimi_mm.errors import UserError
from kimi_mm.evaluation.run_report import read_run
from kimi_mm.generation_speech import SpeechSampling
from kimi_mm.training import chain as chain_module
from kimi_mm.training.chain import Beside, ChainConfig, Clock, load_chain, run_chain
from kimi_mm.training.recipe import load_recipe, recipes_root
from kimi_mm.training.run import train

CHAINS = sorted(path.stem for path in (recipes_root() / "chains").glob("*.yaml"))


def test_nano_v1_from_a_clean_folder(tmp_path):
    """Every sitting on a new machine, which gets the models of the stages that it needs and nothing else."""
    chain = load_chain("nano-v1")
    stages = [stage.name for sitting in chain.sittings for stage in sitting.stages]
    for number, sitting in enumerate(chain.sittings):
        here, before = tmp_path / str(number), tmp_path / str(number - 1)
        own = {stage.name for stage in sitting.stages}
        for source in {source for stage in sitting.stages for source in stage.made_from} - own:
            shutil.copytree(before / source / "model", here / source / "model")
            shutil.copy(before / source / "summary.json", here / source / "summary.json")
        assert run_chain(chain, here, sitting=sitting.name, debug=True)
    last = tmp_path / str(len(chain.sittings) - 1) / stages[-1] / "model"
    first, _ = load_checkpoint(tmp_path / "0" / stages[0] / "model")
    final, _ = load_checkpoint(last)
    for name, tensor in first.audio.state_dict().items():  # ears stayed as they were, but for rounding to int8
        torch.testing.assert_close(tensor, final.audio.state_dict()[name], rtol=0.05, atol=0.05, msg=name)
    engine = kimi_mm.load(last)
    assert isinstance(engine.describe(Image.new("RGB", (40, 40), "red"), "What is it?", max_tokens=4), str)
    sampling = SpeechSampling(max_text_tokens=6, max_audio_codes=8, min_audio_codes=2)
    assert len(engine.speak("one two", sampling=sampling))
    assert isinstance(engine.transcribe(torch.sin(torch.arange(16_000) / 20)).text, str)


def test_a_run_ends_by_its_clock_over_several_starts(tmp_path):
    clock = ["steps=100000", "train_seconds=5.0", "log_every=1", "save_every=100000", "optim.warmup_steps=1"]
    train("text/nano", debug=True, output=tmp_path, overrides=[*clock, "stop_after=2"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert not summary["finished"]
    assert summary["seconds"] > 0
    train("text/nano", debug=True, output=tmp_path, overrides=clock)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"]
    assert 2 < summary["step"] < 100_000
    assert summary["seconds"] >= 5.0
    rates = read_run(tmp_path)["lr"]
    assert rates[0][1] == max(rate for _, rate in rates)
    assert rates[-1][1] < rates[0][1]  # the schedule went on by the clock
    train("text/nano", debug=True, output=tmp_path, overrides=clock)  # and there is nothing more to do
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == summary["step"]


@pytest.mark.parametrize("name", CHAINS)
def test_recipes_and_keys_of_a_chain_are_known(name):
    for sitting in load_chain(name).sittings:
        for stage in sitting.stages:
            if stage.recipe:
                recipe, _ = load_recipe(stage.recipe, overrides=[*stage.overrides, "init="])
                assert recipe.steps > 1000


def one(**changes) -> dict:
    stage = {"name": "a", "recipe": "text/nano", "seconds": 60}
    return {"sittings": [{"name": "s", "minutes": 2, "stages": [{**stage, **changes}]}]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (one(seconds=121), "more than 2 minutes"),
        (one(start="b"), "no stage before it"),
        (one(recepi="x"), "recepi"),
        (one(parts={"vision": "b"}), "needs a start"),
        (one(recipe=""), "neither a recipe nor parts"),
        (one(needs={"speech": 3}), "needs 'speech', which is not prepared"),
        ({"sittings": one()["sittings"] * 2}, "'a' is there twice"),
    ],
)
def test_bad_chains_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ChainConfig.from_dict(values)


def test_what_a_sitting_lacks_is_said(tmp_path, capsys):
    with pytest.raises(UserError, match="bring its folder here"):
        run_chain(load_chain("nano-v1"), tmp_path, sitting="all", debug=True)
    with pytest.raises(UserError, match="no sitting 'nose'; there are ears"):
        run_chain(load_chain("nano-v1"), tmp_path, sitting="nose", debug=True)
    with pytest.raises(ConfigError, match="Known: nano-v1"):
        load_chain("nano-v9")
    with pytest.raises(SystemExit) as stopped:  # too short for anything: to be given again
        cli(["chain", "nano-v1", "--debug", "--minutes", "0.1", "--work", str(tmp_path)])
    assert stopped.value.code == 75
    assert "give the command again" in capsys.readouterr().err


def test_what_does_not_fit_is_made_shorter_when_there_is_one_sitting():
    assert Clock(lambda: None, once=True).overrides(300.0) == ["train_seconds=300.0"]
    assert Clock(lambda: 200.0, once=False).overrides(300.0) == ["train_seconds=300.0", "time_limit_seconds=200.0"]
    assert Clock(lambda: 200.0, once=True).overrides(300.0) == ["train_seconds=140.0", "time_limit_seconds=200.0"]
    assert Clock(lambda: 500.0, once=True).overrides(300.0) == ["train_seconds=300.0", "time_limit_seconds=500.0"]
    assert Clock(lambda: 10.0, once=True).is_up()


def test_preparation_beside_training_is_waited_for(tmp_path):
    (tmp_path / "art").mkdir()
    write_debug_art(tmp_path / "art")
    with Beside(["programs --count 2", "nonsense"], tmp_path) as beside:
        assert beside.has({"speech": 0})  # which nobody prepares: it is there, or the stage will say so
        assert not beside.has({"programs": 0})
        beside.wait({"programs": 0}, 120.0)
        assert (tmp_path / "programs" / "train.jsonl").exists()
        with pytest.raises(UserError, match="prepare nonsense: failed"):
            beside.wait({"nonsense": 0}, 120.0)
    with Beside(["programs --count 2"], tmp_path) as beside:  # noted that it is done
        assert beside._running is None
        assert beside.has({"programs": 0})
    with Beside(["programs --count 3"], tmp_path) as beside:
        assert not beside.has({"programs": 0})


def test_preparation_beside_training_ends_with_the_sitting(tmp_path, monkeypatch):
    sleeping = [sys.executable, "-c", "import time; time.sleep(100)"]
    monkeypatch.setattr(chain_module, "_command", lambda call, data: sleeping)
    with Beside(["speech --hours 1"], tmp_path) as beside:
        beside.wait({"speech": 0}, 0.1)  # the time is up
        (tmp_path / "speech").mkdir()
        for number in range(3):
            (tmp_path / "speech" / f"shard-{number:05d}.jsonl").touch()
        started = time.monotonic()
        beside.wait({"speech": 3}, None)  # enough is there
        assert time.monotonic() - started < 50
        process = beside._running
        assert process is not None
        assert process.poll() is None
    assert process.poll() is not None


def test_two_gpus_take_what_can_start(tmp_path, monkeypatch):
    """Real processes, which find no GPU and train on the CPU: two stages at once, one after them, one that fails."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    _, texts = write_debug_data(tmp_path / "data")
    overrides = ["steps=1000", *small("text/nano"), f"text.path={texts}"]
    stages = [{"name": name, "recipe": "text/nano", "seconds": 1.0, "overrides": overrides} for name in "ab"]
    stages.append({**stages[0], "name": "c", "start": "b"})
    sitting = {"name": "s", "minutes": 2, "gpus": 2, "stages": stages}
    said = []
    assert run_chain(ChainConfig.from_dict({"sittings": [sitting]}), tmp_path, say=said.append)
    assert [line.split()[-1] for line in said[:2]] == ["0", "1"]  # both are begun before one is done
    assert {"a: done", "b: done", "c: done"} < set(said)
    assert sum("b/model" in line for line in said) == 1
    assert "GPU" not in (tmp_path / "a.log").read_text()

    stages[1] = {**stages[1], "name": "d", "overrides": [*overrides, "tokenizer=missing.json"]}
    stages[2] = {**stages[2], "name": "e", "start": "d"}
    with pytest.raises(UserError, match=r"^d: failed; what was said stands in .*d.log"):
        run_chain(ChainConfig.from_dict({"sittings": [sitting]}), tmp_path, say=said.append)
    assert not (tmp_path / "e.log").exists()
    assert "missing.json" in (tmp_path / "d.log").read_text()


def test_a_stage_over_two_gpus(tmp_path, monkeypatch):
    """Two processes that train together, on the CPU; a stage behind them in the file waits for its GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    _, texts = write_debug_data(tmp_path / "data")
    overrides = ["steps=1000", *small("text/nano"), f"text.path={texts}"]
    stages = [
        {"name": name, "recipe": "text/nano", "seconds": 1.0, "gpus": gpus, "overrides": overrides}
        for name, gpus in (("a", 1), ("b", 2), ("c", 1))
    ]
    sitting = {"name": "s", "minutes": 2, "gpus": 2, "stages": stages}
    said = []
    assert run_chain(ChainConfig.from_dict({"sittings": [sitting]}), tmp_path, say=said.append)
    trained = [line.partition(" on GPU ")[2] for line in said if line.startswith("train")]
    assert trained[:2] == ["0", "0, 1"]
    assert said.index("a: done") < said.index("b: done") < said.index("c: done")
    assert "step" in (tmp_path / "b.log").read_text()
    with pytest.raises(ConfigError, match="gpus of a stage must be from 1 to 1"):
        ChainConfig.from_dict({"sittings": [{**sitting, "gpus": 1}]})


def small(recipe: str) -> list[str]:
    """The debug size of a recipe as overrides."""
    values = yaml.safe_load((recipes_root() / f"{recipe}.yaml").read_text())["debug"]
    return [f"{key}={json.dumps(value)}" for key, value in values.items() if key != "steps"]


def test_what_was_brought_along_is_not_prepared_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "texts.jsonl.gz").touch()
    called = []
    monkeypatch.setattr(chain_module, "_prepare", lambda call, seconds: called.append(call))
    values = one()
    values["sittings"][0] |= {"prepare": ["text", "art"], "stages": []}
    run_chain(ChainConfig.from_dict(values), tmp_path / "work", sitting="s")
    assert called == []  # nothing waits to be trained
    monkeypatch.setattr("kimi_mm.training.run.train", lambda *args, **kwargs: {})
    values = one()
    values["sittings"][0] |= {"prepare": ["text", "art"]}
    run_chain(ChainConfig.from_dict(values), tmp_path / "work", sitting="s")
    assert called == ["art"]
