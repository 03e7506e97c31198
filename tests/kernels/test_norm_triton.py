"""The Triton gated norm at small sizes against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton")

from kimi_mm.kernels.norm import reference
from kimi_mm.kernels.norm.triton import CONFIGS, gated_rms_norm
from tests.kernels.small_cases import compare, draw

EPS = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 3, 64), (7, 60), (1, 1000), (33,)], ids=str)
def test_output_and_gradients(shape, dtype):
    inputs = [draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1), draw(shape[-1], seed=2)]
    compare(gated_rms_norm, reference.gated_rms_norm, inputs, eps=EPS)


def test_mixed_dtypes_and_few_programs(monkeypatch):
    monkeypatch.setitem(CONFIGS["backward"], "programs", 2)
    monkeypatch.setitem(CONFIGS["backward"], "elements", 64)
    inputs = [draw(37, 16, dtype=torch.bfloat16), draw(37, 16), draw(16, dtype=torch.bfloat16)]
    compare(gated_rms_norm, reference.gated_rms_norm, inputs, eps=EPS)


def test_no_rows_and_views():
    assert gated_rms_norm(draw(0, 8), draw(0, 8), draw(8), EPS).shape == (0, 8)
    x, gate, weight = draw(6, 5).t(), draw(5, 12)[:, ::2], draw(6)
    assert torch.equal(
        gated_rms_norm(x, gate, weight, EPS), gated_rms_norm(x.contiguous(), gate.contiguous(), weight, EPS)
    )


def test_bad_input_is_refused():
    x, gate, weight = draw(4, 8), draw(4, 8), draw(8)
    for arguments, message in [
        ((x, gate[:2], weight), "gate is"),
        ((x, gate, weight[:4]), "weight is"),
        ((x, gate.double(), weight), "gate is torch.float64"),
        ((x.long(), gate, weight), "x is torch.int64"),
        ((draw(1, 20000), draw(1, 20000), draw(20000)), "1 to 8192"),
    ]:
        with pytest.raises(ValueError, match=message):
            gated_rms_norm(*arguments, EPS)


def test_operator_is_well_formed():
    arguments = (draw(3, 8).requires_grad_(), draw(3, 8), draw(8).requires_grad_(), EPS)
    for check in ("test_schema", "test_autograd_registration", "test_faketensor"):
        torch.library.opcheck(torch.ops.kimi_mm.gated_rms_norm.default, arguments, test_utils=check)
