"""What runs show of themselves: tokens, MFU, loads, hidden states by depth, on the console and in TensorBoard."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kimi_mm.config import ModelConfig
from kimi_mm.data.loader import TextBatch
from kimi_mm.text.backbone import Backbone
from kimi_mm.training.costs import count
from kimi_mm.training.meters import ConsoleTable, Meters
from kimi_mm.training.recipe import recipes_root
from kimi_mm.training.run import train


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone(ModelConfig.from_yaml(recipes_root() / "models" / "debug.yaml").backbone).train()


def test_speed_is_tokens_and_flops_over_time(backbone):
    meters = Meters(backbone, torch.device("cpu"), peak_tflops=0.002, hooks=False)
    ids = torch.zeros(3, 16, dtype=torch.int64)
    for _ in range(2):
        meters.take(TextBatch(ids, ids, ids))
    flops = 96 * count(backbone.config).training_flops(16)
    got = meters.speed(seconds=0.5, groups=2, world=4)
    assert got["tokens_per_second"] == 2 * 96 / 0.5
    assert got["mfu"] == pytest.approx(2 * flops / 0.5 / (4 * 0.002e12))
    assert meters.speed(1.0, 1, 1) == {}
    assert "mfu" not in Meters(backbone, torch.device("cpu"), 0.0, False).speed(1.0, 1, 1)


def test_hidden_states_and_loads_are_read_when_awake(backbone):
    meters = Meters(backbone, torch.device("cpu"), 0.0, hooks=True)
    x = torch.randn(2, 8, 32)
    backbone(x)
    assert meters.hidden() == {}
    meters.awake = True
    backbone(x)
    seen = meters.hidden()
    assert sorted(seen) == ["hidden/00", "hidden/01", "hidden/02"]
    assert all(0 < float(value) < 10 for value in seen.values())
    backbone.zero_grad()
    for layer, counts in zip(backbone.decoder_layers()[1:], ([4.0, 2, 2, 0], [2.0, 3, 1, 2]), strict=True):
        layer.mlp.router.load.copy_(torch.tensor(counts))
    assert {name: float(value) for name, value in meters.loads().items()} == {"load_max": 2.0, "load_min": 0.0}


def test_a_run_logs_them(tmp_path, capfd):
    extra = ["optim.optimizer=muonclip", "peak_tflops=0.1", "log_every=2"]
    numbers = train("text/nano", debug=True, output=tmp_path, overrides=extra)
    assert {"tokens_per_second", "mfu", "load_max", "load_min", "qk_max", "grad_norm", "hidden/00"} <= numbers.keys()
    assert numbers["load_max"] >= 1 >= numbers["load_min"]
    events = EventAccumulator(str(next(tmp_path.glob("tensorboard/events*").__iter__())))
    events.Reload()
    assert [event.step for event in events.Scalars("hidden/02")] == [2, 4]
    lines = [line for line in capfd.readouterr().err.splitlines() if "step 2/4" in line or "tokens_per_second" in line]
    assert "hidden" not in lines[0]
    assert len(lines[0].rstrip()) == len(lines[1].rstrip())  # a header, and numbers under it


def test_the_header_comes_back():
    table = ConsoleTable()
    assert len(table.lines("step 1/9", {"loss": 1.0, "hidden/00": 2.0})) == 2
    assert table.lines("step 2/9", {"loss": 1.5, "hidden/00": 2.0}) == ["step 2/9        1.5"]
    assert len(table.lines("step 3/9", {"loss": 1.0, "text": 2.0})) == 2
