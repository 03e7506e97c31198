"""Muon's updates are near-orthogonal and as large as AdamW's; QK-clip brings every head's largest logit to tau."""

import pytest
import torch
from torch import nn

from kimi_mm.config import BackboneConfig, GQAConfig, KDAConfig, MLAConfig, RopeConfig
from kimi_mm.text.backbone import Backbone
from kimi_mm.training import qk_clip
from kimi_mm.training.muon import Muon, orthogonalize
from kimi_mm.training.recipe import OptimConfig
from kimi_mm.training.trainer import make_optimizer, parameter_groups


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96), (3, 48, 24)])
def test_singular_values_move_to_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = orthogonalize(x)
    values = torch.linalg.svdvals(y)
    assert float(values.max()) < 1.25
    assert float((values > 0.6).float().mean()) > 0.95  # a square random matrix has a value near zero
    # The singular vectors stay: y^T x is symmetric.
    product = y.mT @ x
    torch.testing.assert_close(product, product.mT, atol=2e-3, rtol=1e-3)


def test_zero_gradient_stays_zero():
    assert not orthogonalize(torch.zeros(8, 4)).any()


def test_stacked_experts_are_separate_matrices():
    x = torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(1))
    x[2] *= 1e4
    torch.testing.assert_close(orthogonalize(x), torch.stack([orthogonalize(m) for m in x]), atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(96, 64), (3, 64, 160)])
def test_a_gpu_orthogonalises_in_bf16(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    y = orthogonalize(x.cuda())
    assert y.dtype == torch.bfloat16
    assert y.shape == x.shape
    assert float(torch.cosine_similarity(y.float().cpu().flatten(), orthogonalize(x).flatten(), 0)) > 0.999


def test_vectors_and_tables_follow_adamw():
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4).clone()) for _ in range(2))
    mine = Muon([{"params": [ours]}], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    other = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    for i in range(6):
        ours.grad = torch.sin(torch.arange(12.0) * (i + 1)).view(3, 4)
        theirs.grad = ours.grad.clone()
        mine.step()
        other.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_matrices_follow_torchs_muon():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    ours, theirs = (nn.Parameter(torch.randn(24, 40, generator=torch.Generator().manual_seed(2))) for _ in range(2))
    start = ours.detach().clone()
    mine = Muon([{"params": [ours], "muon": True}], lr=0.01, weight_decay=0.1, momentum=0.95)
    other = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for i in range(4):
        ours.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(i))
        theirs.grad = ours.grad.clone()
        mine.step()
        other.step()
    moved, expected = (ours - start).flatten(), (theirs - start).flatten()
    assert float(torch.cosine_similarity(moved.detach(), expected.detach(), 0)) > 0.999  # theirs iterates in bf16
    assert float((moved.norm() / expected.norm()).detach()) == pytest.approx(1.0, abs=0.02)


def test_updates_have_the_size_of_adamws():
    weight = nn.Parameter(torch.zeros(64, 128))
    optimizer = Muon([{"params": [weight], "muon": True}], lr=1.0, weight_decay=0.0)
    weight.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 1e-6
    optimizer.step()
    assert float(weight.square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"matrices.*not \(5,\)"):
        Muon([{"params": [nn.Parameter(torch.zeros(5))], "muon": True}])


def _backbone(q_lora_rank: int | None) -> Backbone:
    torch.manual_seed(0)
    config = BackboneConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        trunk=("mla/dense", "gqa/dense", "kda/dense"),
        kda=KDAConfig(num_heads=2, head_dim=16),
        mla=MLAConfig(
            num_heads=3,
            kv_lora_rank=16,
            q_lora_rank=q_lora_rank,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            rope=RopeConfig(),
        ),
        gqa=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    )
    return Backbone(config)


def _peaks(model: Backbone, ids: torch.Tensor, **options: torch.Tensor) -> list[torch.Tensor]:
    qk_clip.track(model)
    model.train()
    model(model.embed(ids), **options)
    return [layer.qk_max.peak.clone() for layer in qk_clip.attention_layers(model)]


@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_clipped_heads_end_at_tau_and_others_stay(q_lora_rank):
    model = _backbone(q_lora_rank)
    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in qk_clip.attention_layers(model):
            for name in ("q_proj", "q_b_proj", "k_proj", "kv_b_proj"):
                if hasattr(layer, name):
                    getattr(layer, name).weight.mul_(30.0)
    before = _peaks(model, ids)
    # Later layers read what earlier ones write, so each layer is clipped and measured on its own.
    for number, layer in enumerate(qk_clip.attention_layers(model)):
        tau = float(before[number].sort().values[1]) + 1e-3  # two heads at most stay
        for other in qk_clip.attention_layers(model):
            other.qk_max.peak.zero_()
        layer.qk_max.peak.copy_(before[number])
        assert float(qk_clip.apply(model, tau)) == pytest.approx(float(before[number].max()))
        assert not layer.qk_max.peak.any()
        after = _peaks(model, ids)[number]
        torch.testing.assert_close(after, before[number].clamp_max(tau), rtol=1e-4, atol=1e-4)
        before = _peaks(model, ids)


def test_peaks_are_the_largest_visible_logits():
    model = _backbone(None)
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(2))
    whole = _peaks(model, ids)
    for layer in qk_clip.attention_layers(model):
        layer.qk_max.peak.zero_()
    packed = _peaks(model, ids.view(1, -1), cu_seqlens=torch.tensor([0, 12, 24]))
    for a, b in zip(whole, packed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for layer in qk_clip.attention_layers(model):
        layer.qk_max.peak.zero_()
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=torch.int64)], 1)
    short = _peaks(model, padded, lengths=torch.tensor([12, 12]))
    for a, b in zip(whole, short, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    qk_clip.track(model, False)
    for layer in qk_clip.attention_layers(model):
        layer.qk_max.peak.zero_()
    model(model.embed(ids))
    assert not any(layer.qk_max.peak.any() for layer in qk_clip.attention_layers(model))


def test_a_small_model_learns_with_it():
    model = _backbone(None)
    config = OptimConfig(optimizer="muonclip", lr=0.01)
    groups = parameter_groups(model, config)
    assert {group["muon"] for group in groups} == {True, False}
    assert all(p.dim() >= 2 for group in groups if group["muon"] for p in group["params"])
    optimizer = make_optimizer(model, config, fused=False)
    ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(12):
        logits = model.text_logits(model(model.embed(ids)).text_hidden)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_nothing_to_clip_is_fine():
    assert float(qk_clip.apply(nn.Linear(2, 2))) == 0.0
    with pytest.raises(ValueError, match="tau=0"):
        qk_clip.apply(nn.Linear(2, 2), 0.0)
