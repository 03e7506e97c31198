"""Counts of parameters and FLOPs against built models and hand computation; plans against cases worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kimi_mm.config import BackboneConfig, ConfigError, GQAConfig, MLAConfig, ModelConfig, MoEConfig
from kimi_mm.text.backbone import Backbone
from kimi_mm.training.costs import count, muon_flops, optimizer_flops
from kimi_mm.training.devices import DEVICES, known_device
from kimi_mm.training.plan import Layout, choose_layout, make_plan
from kimi_mm.training.plan_report import cache_bytes
from kimi_mm.training.recipe import recipes_root

MODELS = sorted((recipes_root() / "models").glob("*.yaml"))
ROOT = Path(__file__).resolve().parents[2]
GQA = BackboneConfig(
    vocab_size=100,
    hidden_size=8,
    trunk=("gqa/moe",),
    intermediate_size=12,
    residual="plain",
    gqa=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=4, qkv_bias=False),
    moe=MoEConfig(num_experts=4, num_experts_per_token=2, intermediate_size=6, num_shared_experts=1),
)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_parameters_are_those_of_the_built_model(path):
    config = ModelConfig.from_yaml(path).backbone
    with torch.device("meta"):
        built = Backbone(config)
    assert count(config).total == sum(p.numel() for p in built.parameters())


def test_active_parameters_and_flops_by_hand():
    costs = count(GQA)
    # q 8x8, k and v 4x8, o 8x8; router 4x8; shared 3 x 6x8; two norms
    common = 64 + 32 + 32 + 64 + 32 + 144 + 16
    expert = 3 * 6 * 8
    ends = 2 * 100 * 8 + 8
    assert costs.total == common + 4 * expert + ends
    assert costs.active == common + 2 * expert + ends
    # products, head, and 2 heads x (4 + 4) channels over 5.5 keys
    assert costs.forward_flops(10) == 2 * (common - 16 + 2 * expert) + 2 * 800 + 2 * 2 * 8 * 5.5
    assert costs.training_flops(10) == 3 * costs.forward_flops(10)
    assert muon_flops((8, 6)) == 5 * (4 * 36 * 8 + 2 * 216)
    assert optimizer_flops(costs) == sum(map(muon_flops, [(8, 8)] * 2 + [(4, 8)] * 3 + [(6, 8)] * 3)) + 4 * (
        muon_flops((12, 8)) + muon_flops((8, 6))
    )


def test_flops_are_those_that_torch_counts():
    """One dense MLA layer: torch's counter sees the products; attention on a CPU is beyond it."""
    config = BackboneConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        trunk=("mla/dense",),
        residual="plain",
        mla=MLAConfig(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16),
    )
    model, T = Backbone(config).eval(), 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ids = torch.zeros(1, T, dtype=torch.int64)
        model.text_logits(model(model.embed(ids)).text_hidden)
    attention = 2 * 2 * (16 + 16) * (T + 1) / 2
    assert counter.get_total_flops() == (count(config).forward_flops(T) - attention) * T


def test_memory_of_one_gpu_by_hand():
    layout = Layout(gpus=1, tokens=16)
    plan = make_plan(GQA, layout, DEVICES["H100"])
    total = count(GQA).total
    matrices = total - 1608 - 16  # embedding, head and norms are not Muon's
    assert plan.memory.weights == plan.memory.gradients == 4 * total
    assert plan.memory.optimizer == 4 * matrices + 8 * (total - matrices)
    assert set(plan.sent.values()) == {0.0}
    assert plan.seconds["fsdp"] == plan.seconds["expert"] == 0.0


def test_bytes_sent_by_hand():
    layout = Layout(gpus=8, expert=2, context=2, tokens=16, micro_batches=3)
    plan = make_plan(GQA, layout, DEVICES["H100"])
    costs = count(GQA)
    # 4 copies of 2 experts: 2 shards, 2 replicas
    common, held = costs.total - costs.experts, costs.experts / 2
    assert plan.sent["fsdp"] == pytest.approx(3 * (8 * (common * 7 / 8 + held / 2) + 8 * held / 2 / 2))
    assert plan.sent["expert"] == 2 * 3 * (2 * 8 * 2) * (8 * 3) / 2
    assert plan.sent["context"] == 3 * 2 * (8 * 3) * 2 * 1 * 4
    assert plan.memory.weights == pytest.approx(4 * ((common - 16 - 4 * 8) / 8 + costs.experts / 4 + 16 + 4 * 8))
    assert layout.step_tokens == 4 * 16 * 3
    assert plan.mfu == pytest.approx(
        192 / 8 / sum(plan.seconds.values()) * costs.training_flops(16) / DEVICES["H100"].flops
    )


def test_a_layout_is_found_that_fits():
    config = ModelConfig.from_yaml(recipes_root() / "models" / "48b-a3b.yaml").backbone
    for gpus in (16, 64, 1024):
        plan = choose_layout(config, gpus, DEVICES["H100"], 4096, 4e6)
        assert plan.fits
        assert plan.layout.step_tokens >= 4e6
        assert 0.1 < plan.mfu < 0.5
    assert not choose_layout(config, 8, DEVICES["H100"], 4096, 4e6).fits
    long = choose_layout(config, 64, DEVICES["H100"], 131_072, 4e6)
    assert long.layout.context > 1
    with pytest.raises(ConfigError, match="expert=3 does not divide"):
        choose_layout(config, 8, DEVICES["H100"], 4096, 4e6, expert=3)


def test_cache_of_the_published_model():
    fixed, per_token = cache_bytes(ModelConfig.from_yaml(recipes_root() / "models" / "48b-a3b.yaml").backbone)
    assert per_token == 8064
    assert fixed == 20 * (2 * 2**20 + 2 * 3 * 3 * 4096)


def test_devices_are_known_by_torchs_names():
    for name, key in {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200", "NVIDIA H20": "H20"}.items():
        assert known_device(name) is DEVICES[key]
    assert known_device("Tesla T4") is None


def test_the_page_shows_what_the_command_prints(capsys):
    from kimi_mm.cli.plan import plan

    plan("48b-a3b", gpus="8,16,32,64,128,256,512,1024", memory=True)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").split("<!-- plan -->")[1].split("<!-- /plan")[0]
    assert [line for line in page.splitlines() if line.startswith("|")] == printed
