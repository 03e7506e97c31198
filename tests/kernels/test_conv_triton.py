"""The Triton convolution at small sizes against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton")

from kimi_mm.kernels.conv import reference
from kimi_mm.kernels.conv.triton import CONFIGS, short_conv
from tests.kernels.small_cases import DEVICE, compare, draw


def _case(function):
    """Positional form, so that every tensor counts as an input."""

    def call(x, weight, past, cu_seqlens=None, lengths=None, final=True):
        return function(x, weight, initial_state=past, cu_seqlens=cu_seqlens, lengths=lengths, output_final_state=final)

    return call


KERNEL, REFERENCE = _case(short_conv), _case(reference.short_conv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "T", "C", "W"), [(2, 11, 40, 4), (3, 1, 24, 4), (1, 2, 300, 3), (2, 5, 8, 1)])
def test_dense(B, T, C, W, dtype):
    inputs = [draw(B, T, C, dtype=dtype), draw(C, W), draw(B, W - 1, C, dtype=dtype)]
    compare(KERNEL, REFERENCE, inputs)


def test_without_state_in_one_run(monkeypatch):
    for config in ("forward", "backward"):
        monkeypatch.setitem(CONFIGS[config], "programs", 1)
    compare(KERNEL, REFERENCE, [draw(2, 19, 16), draw(16, 4), None], final=False)


@pytest.mark.parametrize("with_past", [True, False])
def test_packed(with_past):
    sizes = [2, 0, 9, 1, 3, 0]
    cu_seqlens = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], device=DEVICE)
    past = draw(len(sizes), 3, 24) if with_past else None
    compare(KERNEL, REFERENCE, [draw(1, 15, 24), draw(24, 4), past], cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("with_past", [True, False])
def test_lengths(with_past):
    lengths = torch.tensor([6, 0, 2], device=DEVICE)
    inputs = [draw(3, 6, 24), draw(24, 4), draw(3, 3, 24) if with_past else None]
    compare(KERNEL, REFERENCE, inputs, lengths=lengths)


def test_pieces_equal_whole():
    x, weight, state = draw(2, 13, 16), draw(16, 4), draw(2, 3, 16)
    want, final = short_conv(x, weight, initial_state=state, output_final_state=True)
    outs = []
    for piece in x.split([1, 2, 9, 1], 1):
        out, state = short_conv(piece, weight, initial_state=state, output_final_state=True)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), want)
    assert torch.equal(state, final)


def test_other_sequences_cannot_be_seen():
    x = draw(1, 12, 8)
    x[0, :5] = float("nan")
    y, final = short_conv(x, draw(8, 4), cu_seqlens=torch.tensor([0, 5, 12], device=DEVICE), output_final_state=True)
    assert torch.isfinite(y[0, 5:]).all()
    assert torch.isfinite(final[1]).all()


def test_empty_and_strided():
    past = draw(2, 3, 8)
    y, final = short_conv(draw(2, 0, 8), draw(8, 4), initial_state=past, output_final_state=True)
    assert y.shape == (2, 0, 8)
    assert torch.equal(final, past)
    wide = draw(2, 9, 20)
    got, _ = short_conv(wide[..., 4:12], draw(8, 4))
    assert torch.equal(got, short_conv(wide[..., 4:12].contiguous(), draw(8, 4))[0])


def test_bad_input_is_refused():
    x, weight = draw(2, 6, 8), draw(8, 4)
    for change, message in [
        ({"weight": weight[:4]}, "weight is"),
        ({"x": x[0]}, "must be"),
        ({"weight": draw(8, 9)}, "1 to 8"),
        ({"initial_state": draw(2, 4, 8)}, "initial_state is"),
        ({"initial_state": draw(2, 3, 8).double()}, "float64"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "batch size 1"),
        ({"x": x[:1], "cu_seqlens": torch.tensor([0, 4, 3, 6])}, "rise from 0 to 6"),
        ({"x": x[:1], "cu_seqlens": torch.tensor([0.0, 6.0])}, "int32 or int64"),
        ({"lengths": torch.tensor([5])}, "lengths is"),
    ]:
        with pytest.raises(ValueError, match=message):
            short_conv(**{"x": x, "weight": weight, **change})


def test_operators_are_well_formed():
    x, weight = draw(1, 5, 8).requires_grad_(), draw(8, 4).requires_grad_()
    arguments = (x, weight, draw(1, 3, 8), None, None, True)
    torch.library.opcheck(torch.ops.kimi_mm.short_conv.default, arguments, test_utils="test_faketensor")
    torch.library.opcheck(torch.ops.kimi_mm.short_conv.default, arguments, test_utils="test_autograd_registration")
