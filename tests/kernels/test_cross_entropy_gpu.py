"""The fused linear cross entropy on a GPU: real sizes, its memory, poisoned buffers and CUDA graphs."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from kimi_mm.kernels.cross_entropy import reference
from kimi_mm.kernels.cross_entropy import triton as fused

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LIMITS = {torch.float32: (1e-6, 1e-4), torch.bfloat16: (1e-3, 1e-2), torch.float16: (1e-3, 5e-3)}


def _draw(N, D, V, dtype, ignored=0.3):
    torch.manual_seed(N + V)
    hidden, weight = torch.randn(N, D, device="cuda"), torch.randn(V, D, device="cuda") * D**-0.5
    labels = torch.randint(V, (N,), device="cuda").masked_fill(torch.rand(N, device="cuda") < ignored, -100)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


@pytest.fixture
def _poisoned():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("N", "D", "V"), [(1, 64, 1000), (3000, 320, 8192), (2500, 333, 4081), (1100, 512, 50257)])
def test_matrix(N, D, V, dtype):
    hidden, weight, labels = _draw(N, D, V, dtype, ignored=0.3 if N > 1 else 0.0)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    for smoothing in (0.0, 0.1):
        loss = fused.linear_cross_entropy(hidden, weight, labels, label_smoothing=smoothing)
        want = F.cross_entropy(exact[0] @ exact[1].t(), labels, label_smoothing=smoothing)
        assert abs(loss.item() / want.item() - 1.0) < LIMITS[dtype][0]
        got = torch.autograd.grad(loss, (hidden, weight))
        for a, b in zip(got, torch.autograd.grad(want, exact), strict=True):
            assert float((a.double() - b).norm() / b.norm()) < LIMITS[dtype][1]


def test_all_options_agree_with_the_reference():
    inputs = _draw(2000, 256, 5000, torch.float32)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 4.0}
    got, want = (module.linear_cross_entropy(*inputs, **options) for module in (fused, reference))
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, inputs[:2]), torch.autograd.grad(want, inputs[:2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_memory_holds_one_chunk():
    """Without logits whole: one chunk, dW in fp32 beside its bf16 copy, and the gradient of hidden."""
    N, D, V = 16384, 512, 65536
    hidden, weight, labels = _draw(N, D, V, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused.linear_cross_entropy(hidden, weight, labels)
    rows = max(fused.CONFIGS["chunk"]["rows"], fused.CONFIGS["chunk"]["logits"] // V, D)
    allowed = 4 * rows * V + 6 * V * D + 2 * N * D
    assert torch.cuda.max_memory_allocated() - before < 1.1 * allowed
    assert allowed < N * V  # a quarter of what fp32 logits would take


def test_graph_capture_under_autocast():
    hidden, weight, labels = _draw(2000, 320, 4080, torch.float32)

    def loss(hidden, weight):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return fused.linear_cross_entropy(hidden, weight, labels, label_smoothing=0.1)

    samples = tuple(t.detach().clone().requires_grad_() for t in (hidden, weight))
    graphed = torch.cuda.make_graphed_callables(loss, samples)
    got, want = graphed(hidden, weight), loss(hidden, weight)
    assert torch.equal(got, want)
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True
    ):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
