"""A training step reads nothing back from the device, so it can be captured in a CUDA graph."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from kimi_mm.config import BackboneConfig, GQAConfig, KDAConfig, MLAConfig, MoEConfig, RopeConfig
from kimi_mm.text.backbone import Backbone


def _model(device: str, gate: str = "bounded") -> Backbone:
    torch.manual_seed(0)
    config = BackboneConfig(
        vocab_size=64,
        hidden_size=64,
        trunk=("kda/dense", "gqa/moe"),
        text_branch=("mla/moe",),
        audio_branch=("kda/moe",),
        audio_head=True,
        intermediate_size=64,
        kda=KDAConfig(num_heads=2, head_dim=16, gate=gate),
        mla=MLAConfig(num_heads=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, rope=RopeConfig()),
        gqa=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=16),
        moe=MoEConfig(intermediate_size=32),
    )
    return Backbone(config).to(device)


def _step(model: Backbone, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16) if ids.is_cuda else nullcontext():
        out = model(model.embed(ids, ids), lengths=lengths)
        heads = ((model.text_logits, out.text_hidden), (model.audio_logits, out.audio_hidden))
        loss = sum(F.cross_entropy(head(hidden).float().flatten(0, 1), ids.flatten()) for head, hidden in heads)
    loss.backward()
    model.update_expert_bias()
    return loss.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["dense experts", "grouped experts"])
@pytest.mark.parametrize("gate", ["bounded", "softplus"])
def test_no_shape_depends_on_values(gate, dtype):
    """On the meta device a tensor has no values: any readback raises."""
    model = _model("meta", gate).to(dtype)
    ids = torch.zeros(2, 40, dtype=torch.int64, device="meta")
    loss = _step(model, ids, torch.zeros(2, dtype=torch.int64, device="meta"))
    assert loss.shape == ()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_step_equals_eager_step():
    model = _model("cuda")
    ids = torch.randint(0, 64, (2, 40), device="cuda")
    lengths = torch.tensor([40, 17], device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad()
            want = _step(model, ids, lengths)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = _step(model, ids, lengths)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
