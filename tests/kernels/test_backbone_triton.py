"""The whole backbone on Triton kernels (a GPU, or Triton's interpreter) against itself on the reference."""

import pytest
import torch

from kimi_mm import kernels
from kimi_mm.config import BackboneConfig, KDAConfig, MLAConfig, MoEConfig
from kimi_mm.kernels import dispatch
from kimi_mm.text.backbone import Backbone

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIGS = {
    "bounded": KDAConfig(num_heads=2, head_dim=16),
    "softplus": KDAConfig(num_heads=1, num_value_heads=2, head_dim=12, value_head_dim=20, gate="softplus"),
}


@pytest.fixture(autouse=True)
def _fresh_choice():
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture(params=CONFIGS)
def model(request):
    config = BackboneConfig(
        vocab_size=40,
        hidden_size=32,
        trunk=("kda/dense",),
        text_branch=("mla/moe",),
        attn_res_block_size=1,
        intermediate_size=48,
        kda=CONFIGS[request.param],
        mla=MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=16),
        moe=MoEConfig(num_experts=3, num_experts_per_token=2, intermediate_size=16),
    )
    torch.manual_seed(0)
    model = Backbone(config).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _both(monkeypatch, call):
    results = []
    for mode in ("reference", "triton"):
        monkeypatch.setenv("KIMI_MM_KERNELS", mode)
        dispatch.forget()
        results.append(call())
    return results


def _close(want, got, limit=2e-5):
    for a, b in zip(want, got, strict=True):
        assert (a - b).norm() <= limit * a.norm() + 1e-7


@pytest.mark.parametrize("how", ["batch", "packed"])
def test_outputs_and_gradients(model, how, monkeypatch):
    x = torch.randn(1 if how == "packed" else 2, 11, 32, device=DEVICE, requires_grad=True)
    bounds = torch.tensor([0, 1, 7, 7, 11], device=DEVICE) if how == "packed" else None

    def run():
        out = model(x, cu_seqlens=bounds).text_hidden
        named = dict(model.named_parameters())
        leaves = [x, *(p for name, p in named.items() if "embed" not in name)]
        return [out, *torch.autograd.grad(out.square().sum(), leaves, materialize_grads=True)]

    _close(*_both(monkeypatch, run), limit=1e-4)


def test_cached_steps(model, monkeypatch):
    x = torch.randn(2, 9, 32, device=DEVICE)

    def run():
        cache = model.new_cache(2)
        parts = [model(x[:, :6], cache=cache).text_hidden]
        parts += [model(x[:, t : t + 1], cache=cache).text_hidden for t in range(6, 9)]
        return [torch.cat(parts, 1), *(layer.recurrent for layer in cache.layers[:1])]

    with torch.inference_mode():
        _close(*_both(monkeypatch, run))


def test_the_choice_is_triton(monkeypatch):
    monkeypatch.setenv("KIMI_MM_KERNELS", "triton")
    for name in set(kernels.__all__) - {"KernelError", "resolve"}:
        assert "triton" in dispatch.resolve(name, DEVICE).__module__


@pytest.mark.gpu
def test_mixed_precision_training(model, monkeypatch):
    x = torch.randn(4, 300, 32, device="cuda", requires_grad=True)

    def run():
        with torch.autocast("cuda", torch.bfloat16):
            out = model(x).text_hidden
        leaves = [x, *(p for name, p in model.named_parameters() if "embed" not in name)]
        return [out, *torch.autograd.grad(out.float().square().mean(), leaves, materialize_grads=True)]

    for want, got in zip(*_both(monkeypatch, run), strict=True):
        assert got.isfinite().all()
        assert (want.float() - got.float()).norm() <= 0.1 * want.float().norm() + 1e-4


@pytest.mark.gpu
def test_training_step_as_a_cuda_graph(model, monkeypatch):
    monkeypatch.setenv("KIMI_MM_KERNELS", "triton")
    dispatch.forget()
    sample = torch.randn(2, 64, 32, device="cuda", requires_grad=True)

    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = model

        def forward(self, x):
            return self.backbone(x).text_hidden

    used = {name for name, p in model.named_parameters() if "embed" not in name}
    for name, p in model.named_parameters():
        p.requires_grad_(name in used)
    # Before anything eager: a live graph of the parameters on the default stream would break the capture.
    graphed = torch.cuda.make_graphed_callables(Hidden(), (sample,), allow_unused_input=True)
    x = torch.randn_like(sample, requires_grad=True)
    want, got = Hidden()(x), graphed(x)
    (d_want,) = torch.autograd.grad(want.square().sum(), x)
    (d_got,) = torch.autograd.grad(got.square().sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d_got, d_want, rtol=1e-3, atol=1e-4)
