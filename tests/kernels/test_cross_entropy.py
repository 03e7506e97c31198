"""The fused linear cross entropy, plain and in Triton (interpreted without a GPU), against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F

from kimi_mm.kernels import linear_cross_entropy
from kimi_mm.kernels.cross_entropy import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2, "softcap": 3.0},
    {"label_smoothing": 0.2, "z_loss": 1e-3},
]


def _implementations():
    yield pytest.param(reference, id="reference")
    try:
        from kimi_mm.kernels.cross_entropy import triton
    except ImportError:
        return
    yield pytest.param(triton, id="triton")


both = pytest.mark.parametrize("module", list(_implementations()))


def _draw(N, D, V, dtype=torch.float32, ignored=0.3):
    torch.manual_seed(N + V)
    hidden, weight = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype)
    labels = torch.randint(V, (N,)).masked_fill(torch.rand(N) < ignored, -100)
    return hidden.to(DEVICE), weight.to(DEVICE), labels.to(DEVICE)


def _expected(hidden, weight, labels, label_smoothing=0.0, z_loss=0.0, softcap=None):
    z = (hidden @ weight.t())[labels != -100]
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z, labels[labels != -100], label_smoothing=label_smoothing)
    return loss + z_loss * z.logsumexp(1).square().mean()


def _check(module, inputs, loss_limit, gradient_limit, **options):
    hidden, weight, labels = inputs
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    loss, want = module.linear_cross_entropy(*leaves, labels, **options), _expected(*exact, labels, **options)
    assert loss.dtype == torch.float32
    assert abs(loss.item() / want.item() - 1.0) < loss_limit
    got = torch.autograd.grad(loss * 3.0, leaves)
    for a, b in zip(got, torch.autograd.grad(want * 3.0, exact), strict=True):
        assert float((a.double() - b).norm() / b.norm()) < gradient_limit
    with torch.no_grad():
        assert abs(module.linear_cross_entropy(*leaves, labels, **options).item() / want.item() - 1.0) < loss_limit


@both
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradients(module, options):
    _check(module, _draw(13, 8, 37), 1e-6, 1e-5, **options)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(module, dtype):
    _check(module, _draw(24, 16, 50, dtype), 2e-3, 1e-2)


@both
def test_many_chunks_and_blocks(module, monkeypatch):
    if module is reference:
        monkeypatch.setattr(module, "CHUNK_LOGITS", 1)
    else:
        monkeypatch.setitem(module.CONFIGS["chunk"], "logits", 1)
        monkeypatch.setitem(module.CONFIGS["chunk"], "rows", 8)
        monkeypatch.setitem(module.CONFIGS["loss"], "BLOCK", 16)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        _check(module, _draw(20, 8, 40, dtype), 2e-3, limit, label_smoothing=0.1, softcap=5.0)


@both
def test_huge_logits_stay_finite(module):
    hidden, weight, labels = _draw(6, 4, 20)
    _check(module, (hidden * 1e3, weight * 1e2, labels), 1e-5, 1e-4)
    with torch.no_grad():
        assert module.linear_cross_entropy(hidden * 1e3, weight * 1e2, labels, softcap=1.0).isfinite()


@both
@pytest.mark.parametrize("N", [0, 5])
def test_without_labels_the_loss_is_zero(module, N):
    hidden, weight, labels = _draw(N, 4, 6, ignored=2.0)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = module.linear_cross_entropy(hidden, weight, labels)
    assert loss.item() == 0.0
    loss.backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


@both
def test_only_what_needs_gradients_gets_them(module):
    hidden, weight, labels = _draw(9, 4, 11)
    hidden.requires_grad_()
    module.linear_cross_entropy(hidden, weight, labels).backward()
    assert hidden.grad.any()
    assert weight.grad is None


@both
def test_autocast(module):
    hidden, weight, labels = _draw(20, 16, 30)
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = module.linear_cross_entropy(*leaves, labels)
    assert loss.dtype == torch.float32
    want = torch.autograd.grad(_expected(*exact, labels), exact)
    for a, b in zip(torch.autograd.grad(loss, leaves), want, strict=True):
        assert a.dtype == torch.float32
        assert float((a.double() - b).norm() / b.norm()) < 1e-2


@both
def test_bad_input(module):
    hidden, weight, labels = _draw(5, 4, 6)
    for message, call in {
        r"weight \[6, 3\]": lambda: module.linear_cross_entropy(hidden, weight[:, :3], labels),
        "must be int64": lambda: module.linear_cross_entropy(hidden, weight, labels.int()),
        "label_smoothing=1.0": lambda: module.linear_cross_entropy(hidden, weight, labels, label_smoothing=1.0),
        "one dtype": lambda: module.linear_cross_entropy(hidden.half(), weight, labels),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_a_label_outside_the_vocabulary_shows():
    triton = pytest.importorskip("kimi_mm.kernels.cross_entropy.triton")
    hidden, weight, labels = _draw(5, 4, 6)
    labels[2] = 6
    assert triton.linear_cross_entropy(hidden, weight, labels).isnan()


def test_gradcheck_in_float64():
    hidden, weight, labels = (t.cpu() for t in _draw(5, 3, 7, torch.float64))
    leaves = (hidden.requires_grad_(), weight.requires_grad_())

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, label_smoothing=0.1, z_loss=1e-2, softcap=2.0)

    assert torch.autograd.gradcheck(loss, leaves)


def test_compiled_by_torch():
    triton = pytest.importorskip("kimi_mm.kernels.cross_entropy.triton")
    hidden, weight, labels = _draw(9, 4, 11)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    compiled = torch.compile(triton.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    got, want = compiled(*leaves, labels), triton.linear_cross_entropy(*leaves, labels)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)
