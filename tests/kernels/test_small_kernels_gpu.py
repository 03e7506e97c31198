"""Convolution, gated norm, attention over depth and KDA's step on a GPU: sizes, dtypes, poisoned memory, graphs."""

import pytest
import torch

pytest.importorskip("triton")

from kimi_mm.kernels.attn_res import reference as attn_res_reference
from kimi_mm.kernels.attn_res import triton as attn_res
from kimi_mm.kernels.conv import reference as conv_reference
from kimi_mm.kernels.conv.triton import short_conv
from kimi_mm.kernels.kda import reference as kda_reference
from kimi_mm.kernels.kda.triton_step import kda_decode, kda_step
from kimi_mm.kernels.norm import reference as norm_reference
from kimi_mm.kernels.norm.triton import gated_rms_norm
from tests.kernels.small_cases import compare, draw, relative_rms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
MIXES = [(1, 320, 50), (2, 48, 3), (5, 320, 5000), (9, 2304, 1500), (9, 1000, 77), (12, 2304, 30), (33, 2304, 900)]
MIXES += [(9, 7168, 300), (7, 1001, 65), (70, 512, 40), (129, 64, 10)]
STEP_LIMIT = {F32: 1e-5, BF16: 5e-3, F16: 5e-3}


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that is not written reads as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


class TestShortConv:
    @staticmethod
    def _compare(x, weight, past, **options):
        case = lambda function: lambda x, weight, past: function(x, weight, initial_state=past, **options)  # noqa: E731
        compare(case(short_conv), case(conv_reference.short_conv), [x, weight, past])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "sizes", [(8, 391, 960, 4), (1, 2048, 12288, 4), (3, 77, 1001, 4), (2, 130, 64, 3), (64, 1, 4096, 4)], ids=str
    )
    @pytest.mark.parametrize("with_past", [False, True])
    def test_dense(self, sizes, dtype, with_past):
        B, T, C, W = sizes
        past = draw(B, W - 1, C, seed=3, dtype=dtype) if with_past else None
        self._compare(draw(B, T, C, dtype=dtype), draw(C, W, seed=1), past, output_final_state=with_past)

    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    def test_lengths(self, dtype):
        lengths = torch.tensor([200, 0, 1, 2, 3, 64, 199, 100], device="cuda")
        x, past = draw(8, 200, 320, dtype=dtype), draw(8, 3, 320, seed=3, dtype=dtype)
        self._compare(x, draw(320, 4, seed=1), past, output_final_state=True, lengths=lengths)

    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    @pytest.mark.parametrize("with_past", [False, True])
    def test_packed(self, dtype, with_past):
        sizes = [5, 0, 1, 2, 300, 3, 64, 0, 7, 1, 1, 500]
        cu_seqlens = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], device="cuda", dtype=torch.int32)
        past = draw(len(sizes), 3, 520, seed=3, dtype=dtype) if with_past else None
        x = draw(1, sum(sizes), 520, dtype=dtype)
        self._compare(x, draw(520, 4, seed=1), past, output_final_state=True, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 200, 5, 64), (2, 1000, 32, 128), (777, 100), (5, 2304), (3, 7168)], ids=str)
def test_gated_norm(shape, dtype):
    inputs = [draw(*shape, dtype=dtype), draw(*shape, seed=1, dtype=dtype), draw(shape[-1], seed=2)]
    compare(gated_rms_norm, norm_reference.gated_rms_norm, inputs, eps=1e-5)


class TestAttnRes:
    @staticmethod
    def _sources(n, D, R, dtype, first=None, spread=0.0):
        scales = 10.0 ** torch.linspace(-spread, spread, n)
        return [
            draw(1, R, D, seed=i, scale=float(scales[i]), dtype=first if first and i == 0 else dtype) for i in range(n)
        ]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("n", "D", "R"), MIXES)
    def test_mix(self, n, D, R, dtype):
        inputs = [self._sources(n, D, R, dtype), draw(D, seed=200) * D**-0.5, draw(D, seed=201)]
        compare(attn_res.attn_res_mix, attn_res_reference.attn_res_mix, inputs, eps=1e-6)

    @pytest.mark.parametrize("spread", [0.0, 3.0])
    def test_first_in_fp32(self, spread):
        inputs = [self._sources(6, 320, 999, BF16, F32, spread), draw(320, seed=200) * 0.05, draw(320, seed=201)]
        compare(attn_res.attn_res_mix, attn_res_reference.attn_res_mix, inputs, eps=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("n", "D", "R"), [(1, 320, 9), (5, 320, 3000), (9, 2304, 900), (20, 2304, 50), (9, 7168, 99)]
    )
    def test_mix_and_norm(self, n, D, R, dtype):
        case = lambda function: lambda s, q, w, o: function(s, q, w, 1e-6, o, 1e-5)  # noqa: E731
        vectors = [draw(D, seed=200) * D**-0.5, draw(D, seed=201), draw(D, seed=202)]
        both = case(attn_res.attn_res_mix_norm), case(attn_res_reference.attn_res_mix_norm)
        compare(*both, [self._sources(n, D, R, dtype), *vectors])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("n", "D", "S"), [(1, 320, 4), (9, 2304, 12), (4, 1000, 3), (9, 7168, 2)])
    def test_two_phases(self, n, D, S, dtype):
        sources, partial = self._sources(n, D, 70, dtype), draw(1, 70, D, seed=99, dtype=dtype)
        queries, weights, out_weight = draw(S, D, seed=20) * D**-0.5, draw(S, D, seed=21), draw(D, seed=22)
        begun = attn_res.attn_res_begin(sources, queries, weights, 1e-6)
        for s in range(S):
            part = partial if s else None
            slice_ = (*(x[s] for x in begun), part, queries[s], weights[s], 1e-6)
            rows = [x.double() for x in ([*sources, partial] if s else sources)]
            exact = (rows, queries[s].double(), weights[s].double(), 1e-6)
            got = attn_res.attn_res_finish(*slice_)
            assert relative_rms(got, attn_res_reference.attn_res_mix(*exact)) < 1e-5
            got = attn_res.attn_res_finish_norm(*slice_, out_weight, 1e-5, dtype)
            want = attn_res_reference.attn_res_mix_norm(*exact, out_weight.double(), 1e-5)
            assert got.dtype == dtype
            assert relative_rms(got, want) < STEP_LIMIT[dtype]


class TestStep:
    SIZES = ((64, 32, 32, 128, 128), (3, 5, 5, 64, 64), (2, 4, 8, 60, 100), (1, 2, 4, 256, 256), (5, 1, 1, 12, 20))

    @staticmethod
    def _double(x):
        return {k: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for k, t in x.items()}

    @pytest.mark.parametrize("slots", [False, True])
    @pytest.mark.parametrize("gate", ["bounded", "softplus"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    def test_step_and_decode(self, sizes, dtype, gate, slots):
        B, H, HV, K, V = sizes
        C, places = 2 * H * K + HV * V, B + 2 if slots else B
        options = {"gate": gate, "A_log": draw(HV, seed=7) * 0.5, "dt_bias": draw(HV * K, seed=8)}
        if slots:
            options["slots"] = torch.randperm(places, device="cuda")[:B].int()
            options["slots"][B // 2] = -1
        qkv, state = draw(B, C, seed=1, dtype=dtype), draw(places, HV, V, K, seed=6)
        g, beta = draw(B, HV, K, seed=4, dtype=dtype), draw(B, HV, seed=5, dtype=dtype)
        q, k, v = qkv.split([H * K, H * K, HV * V], 1)
        x = {"q": q.view(B, H, K), "k": k.view(B, H, K), "v": v.view(B, HV, V), "g": g, "beta": beta}
        norms = {"qk_l2norm": True, "beta_sigmoid": True}
        want, want_state = kda_reference.kda_step(
            **self._double(x), state=state.double(), **self._double(options), **norms
        )
        moving = state.clone()
        got, _ = kda_step(**x, state=moving, **options, **norms)
        assert relative_rms(got, want) < STEP_LIMIT[dtype]
        assert relative_rms(moving, want_state) < 1e-5

        y = {"qkv": qkv, "conv_weight": draw(C, 4, seed=2), "conv_state": draw(places, 3, C, seed=3, dtype=dtype)}
        y |= {"g": g, "beta": beta, "out_gate": draw(B, HV, V, seed=9, dtype=dtype), "norm_weight": draw(V, seed=10)}
        wants = kda_reference.kda_decode(**self._double(y), state=state.double(), eps=1e-5, **self._double(options))
        moving = state.clone()
        got, _, conv_state = kda_decode(**y, state=moving, eps=1e-5, **options)
        assert relative_rms(got, wants[0]) < STEP_LIMIT[dtype]
        assert relative_rms(moving, wants[1]) < 1e-5
        assert torch.equal(conv_state.double(), wants[2])

    def test_many_steps_in_a_graph(self):
        """64 replays of one captured step equal 64 steps of the reference."""
        B, H, K = 4, 2, 64
        shapes = {"q": (B, H, K), "k": (B, H, K), "v": (B, H, K), "g": (B, H, K), "beta": (B, H)}
        inputs = {name: torch.zeros(shape, device="cuda") for name, shape in shapes.items()}
        state, want_state = torch.zeros(B, H, K, K, device="cuda"), torch.zeros(B, H, K, K, device="cuda").double()
        options = {"gate": "bounded", "qk_l2norm": True, "beta_sigmoid": True}
        kda_step(**inputs, state=state, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = kda_step(**inputs, state=state, **options)
        state.zero_()
        for step in range(64):
            for place, (name, shape) in enumerate(shapes.items()):
                inputs[name].copy_(draw(*shape, seed=step * 10 + place))
            graph.replay()
            want, _ = kda_reference.kda_step(**self._double(inputs), state=want_state, **options)
            assert relative_rms(out, want) < 1e-5
        assert relative_rms(state, want_state) < 1e-5


class Block(torch.nn.Module):
    """What a KDA layer does around its recurrence, and a read from depth."""

    def __init__(self, D, fused):
        super().__init__()
        self.proj = torch.nn.Linear(D, D, bias=False)
        self.conv_weight = torch.nn.Parameter(draw(D, 4, seed=1) * 0.5)
        self.norm_weight = torch.nn.Parameter(draw(D, seed=2))
        self.query = torch.nn.Parameter(draw(D, seed=3) * 0.1)
        self.fused = fused

    def forward(self, x):
        y = self.proj(x)
        z, _ = (short_conv if self.fused else conv_reference.short_conv)(y, self.conv_weight)
        norm = gated_rms_norm if self.fused else norm_reference.gated_rms_norm
        z = norm(z, y, self.norm_weight, 1e-5)
        mix = attn_res.attn_res_mix if self.fused else attn_res_reference.attn_res_mix
        return mix([x, y, z], self.query, self.norm_weight, 1e-6)


def _block(fused):
    torch.manual_seed(0)
    return Block(320, fused).cuda()


def _autocast_run(block, x, module):
    x = x.clone().requires_grad_()
    with torch.autocast("cuda", dtype=BF16, cache_enabled=False):
        out = block(x)
    return [out, *torch.autograd.grad(out, [x, *module.parameters()], torch.ones_like(out))]


@pytest.mark.parametrize("how", ["eager", "graphed", "compiled"])
def test_training_under_autocast(how):
    """Dtypes and values as the reference gives them; graph capture and torch.compile change nothing."""
    torch.use_deterministic_algorithms(False)  # filling memory would be captured as well
    fused, plain, x = _block(True), _block(False), draw(4, 333, 320)
    want = _autocast_run(plain, x, plain)
    block = fused
    if how == "graphed":
        with torch.autocast("cuda", dtype=BF16, cache_enabled=False):
            block = torch.cuda.make_graphed_callables(fused, (x.clone().requires_grad_(),))
    if how == "compiled":
        block = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for got, true in zip(_autocast_run(block, x, fused), want, strict=True):
        assert got.dtype == true.dtype
        assert relative_rms(got, true) < 2e-2
