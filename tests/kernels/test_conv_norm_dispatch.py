"""Short convolution, gated norm, and the choice of implementations."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from kimi_mm import kernels
from kimi_mm.kernels import dispatch, gated_rms_norm, short_conv


def _conv(x, weight, past=None):
    past = torch.zeros(x.shape[0], weight.shape[1] - 1, x.shape[2], dtype=x.dtype) if past is None else past
    rows = torch.cat([past, x], 1).transpose(1, 2)
    return F.silu(F.conv1d(rows, weight[:, None], groups=weight.shape[0])).transpose(1, 2)


class TestShortConv:
    x = torch.randn(2, 11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    past = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def test_equals_conv1d_with_gradients(self):
        leaves = [t.clone().requires_grad_() for t in (self.x, self.weight, self.past)]
        out, _ = short_conv(leaves[0], leaves[1], initial_state=leaves[2])
        want = _conv(*leaves)
        torch.testing.assert_close(out, want)
        upstream = torch.randn_like(out)
        for a, b in zip(
            torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(want, leaves, upstream), strict=True
        ):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("sizes", [[11], [1] * 11, [2, 5, 4], [10, 1]])
    def test_pieces_equal_whole(self, sizes):
        want, final = short_conv(self.x, self.weight, initial_state=self.past, output_final_state=True)
        state, outs = self.past, []
        for piece in self.x.split(sizes, 1):
            out, state = short_conv(piece, self.weight, initial_state=state, output_final_state=True)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), want)
        assert torch.equal(state, final)

    def test_lengths_decide_the_state(self):
        lengths = torch.tensor([0, 2])
        _, state = short_conv(self.x, self.weight, initial_state=self.past, output_final_state=True, lengths=lengths)
        assert torch.equal(state[0], self.past[0])
        assert torch.equal(state[1], torch.cat([self.past[1, 2:], self.x[1, :2]]))

    @pytest.mark.parametrize("with_state", [True, False])
    def test_packed_equals_alone(self, with_state):
        sizes = [2, 0, 6, 1, 2]
        past = torch.randn(5, 3, 6, dtype=torch.float64) if with_state else None
        cu_seqlens = torch.tensor([0, 2, 2, 8, 9, 11])
        out, state = short_conv(
            self.x[:1], self.weight, initial_state=past, output_final_state=True, cu_seqlens=cu_seqlens
        )
        start = 0
        for n, size in enumerate(sizes):
            own = None if past is None else past[n : n + 1]
            alone, final = short_conv(
                self.x[:1, start : start + size], self.weight, initial_state=own, output_final_state=True
            )
            torch.testing.assert_close(out[:, start : start + size], alone)
            assert torch.equal(state[n], final[0])
            start += size

    def test_packed_batch_is_refused(self):
        with pytest.raises(ValueError, match="batch size 1"):
            short_conv(self.x, self.weight, cu_seqlens=torch.tensor([0, 11]))


def test_gated_norm():
    x, gate, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 8), (3, 8), (8,)))
    want = weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * torch.sigmoid(gate)
    torch.testing.assert_close(gated_rms_norm(x, gate, weight, 1e-5), want)
    assert torch.autograd.gradcheck(lambda *t: gated_rms_norm(*t, 1e-5), (x, gate, weight))


class TestDispatch:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        dispatch.forget()
        yield
        dispatch.forget()

    def test_cpu_takes_the_reference_and_says_so_once(self, caplog):
        with caplog.at_level("INFO"):
            for _ in range(3):
                assert dispatch.resolve("kda_step", "cpu").__module__ == "kimi_mm.kernels.kda.reference"
        assert [r.message for r in caplog.records if "kda_step" in r.message] == [
            next(r.message for r in caplog.records if "kda_step on cpu: reference" in r.message)
        ]

    @pytest.mark.parametrize("how", ["argument", "environment"])
    def test_asking_for_triton_on_a_cpu_is_refused(self, how, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if how == "environment":
            monkeypatch.setenv("KIMI_MM_KERNELS", "triton")
        with pytest.raises(kernels.KernelError, match="use 'auto' or 'reference'"):
            dispatch.resolve("chunk_kda", torch.device("cpu"), "triton" if how == "argument" else None)

    def test_unknown_names_are_refused(self, monkeypatch):
        with pytest.raises(kernels.KernelError, match="Unknown kernel 'chunk_kd'"):
            dispatch.resolve("chunk_kd", "cpu")
        monkeypatch.setenv("KIMI_MM_KERNELS", "cuda")
        with pytest.raises(kernels.KernelError, match="must be one of"):
            dispatch.resolve("chunk_kda", "cpu")

    def test_every_public_operation_resolves_to_either_twin(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        for name in set(kernels.__all__) - {"KernelError", "resolve"}:
            assert dispatch.resolve(name, "cpu", "reference").__module__.endswith(".reference")
            for twin in (dispatch.resolve(name, "cuda"), dispatch.resolve(name, "cpu", "triton")):
                assert twin.__module__.split(".")[-1] in ("triton", "triton_step")
                assert inspect.signature(twin) == inspect.signature(dispatch.resolve(name, "cpu", "reference"))
