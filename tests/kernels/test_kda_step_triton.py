"""KDA's decoding kernels at small sizes against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton")

from kimi_mm.kernels.kda import reference
from kimi_mm.kernels.kda.triton_step import CONFIGS, kda_decode, kda_step
from tests.kernels.small_cases import DEVICE, draw, relative_rms

BF16, F32 = torch.bfloat16, torch.float32
SIZES = [(2, 1, 1, 16, 16), (1, 2, 4, 12, 20), (2, 2, 2, 24, 40)]  # B H HV K V
LIMIT = {F32: 1e-5, BF16: 5e-3}


def _constants(HV, K, gate):
    if gate == "given":
        return {"gate": gate}
    return {"gate": gate, "A_log": draw(HV, seed=7) * 0.5, "dt_bias": draw(HV * K, seed=8)}


def _inputs(B, H, HV, K, V, gate, dtype, places=None):
    low = {"q": draw(B, H, K, seed=1), "k": draw(B, H, K, seed=2), "v": draw(B, HV, V, seed=3)}
    low = {name: x.to(dtype) for name, x in low.items()}
    g = draw(B, HV, K, seed=4) * 2.0
    g = -g.abs() if gate == "given" else g.to(dtype)
    return low | {"g": g, "beta": draw(B, HV, seed=5, dtype=dtype)}, draw(places or B, HV, V, K, seed=6)


def _double(x):
    return {name: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for name, t in x.items()}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("gate", ["bounded", "softplus", "given"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_step(sizes, gate, dtype, monkeypatch):
    monkeypatch.setitem(CONFIGS["step"], "BV", 16)  # several tiles of rows
    x, state = _inputs(*sizes, gate, dtype)
    options = {"qk_l2norm": gate != "given", "beta_sigmoid": gate != "given", **_constants(sizes[2], sizes[3], gate)}
    if gate == "given":
        x["q"], x["k"], x["beta"] = x["q"] * 0.2, x["k"] * 0.2, x["beta"].sigmoid()
        options["scale"] = 0.3
    want, want_state = reference.kda_step(**_double(x), state=state.double(), **_double(options))
    got, returned = kda_step(**x, state=state, **options)
    assert returned is state
    assert got.dtype == dtype
    assert relative_rms(got, want) < LIMIT[dtype]
    assert relative_rms(state, want_state) < 1e-5


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("slots", [[4, 0], [-1, 2], [-1, -1]], ids=str)
def test_step_with_slots(slots, dtype):
    x, state = _inputs(2, 1, 2, 12, 20, "bounded", dtype, places=5)
    slots = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    options = {**_constants(2, 12, "bounded"), "slots": slots}
    before = state.clone()
    state[[place for place in range(5) if place not in slots.tolist()]] = float("nan")  # must not be touched
    want, want_state = reference.kda_step(**_double(x), state=before.double(), **_double(options))
    got, _ = kda_step(**x, state=state, **options)
    untouched = state.isnan()
    assert untouched.flatten(1).all(1).tolist() == [place not in slots.tolist() for place in range(5)]
    assert relative_rms(got, want) < LIMIT[dtype]
    assert relative_rms(torch.where(untouched, before, state), want_state) < 1e-5
    assert not got[slots < 0].any()


def test_step_takes_slices_of_one_projection():
    x, state = _inputs(3, 2, 2, 16, 16, "bounded", F32)
    packed = torch.cat([x[name].flatten(1) for name in "qkv"], 1)
    views = {name: part.view(3, 2, 16) for name, part in zip("qkv", packed.split(32, 1), strict=True)}
    want, _ = kda_step(**x, state=state.clone(), gate="bounded")
    got, _ = kda_step(**{**x, **views}, state=state, gate="bounded")
    assert torch.equal(got, want)


def _decode_inputs(B, H, HV, K, V, W, dtype, places=None):
    C = 2 * H * K + HV * V
    return {
        "qkv": draw(B, C, seed=1, dtype=dtype),
        "conv_weight": draw(C, W, seed=2),
        "conv_state": draw(places or B, W - 1, C, seed=3, dtype=dtype),
        "g": draw(B, HV, K, seed=4, dtype=dtype),
        "beta": draw(B, HV, seed=5, dtype=dtype),
        "state": draw(places or B, HV, V, K, seed=6),
        "out_gate": draw(B, HV, V, seed=9, dtype=dtype),
        "norm_weight": draw(V, seed=10),
    }


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "W"), [((2, 1, 1, 16, 16), 4), ((1, 2, 4, 12, 20), 4), ((2, 1, 1, 24, 40), 3)], ids=str
)
@pytest.mark.parametrize("slots", [False, True])
def test_decode(sizes, W, slots, dtype, monkeypatch):
    monkeypatch.setitem(CONFIGS["decode"], "BV", 16)
    B, _, HV, K, _ = sizes
    x = _decode_inputs(*sizes, W, dtype, places=4 if slots else None)
    options = _constants(HV, K, "bounded")
    if slots:
        options["slots"] = torch.tensor([3, -1][:B], dtype=torch.int32, device=DEVICE)
    want = reference.kda_decode(**_double(x), eps=1e-5, **_double(options))
    got = kda_decode(**x, eps=1e-5, **options)
    assert got[0].dtype == dtype
    assert got[1] is x["state"]
    assert got[2] is x["conv_state"]
    assert relative_rms(got[0], want[0]) < LIMIT[dtype]
    assert relative_rms(got[1], want[1]) < 1e-5
    assert torch.equal(got[2].double(), want[2])


def test_decode_reference_is_its_parts():
    """Two tokens one after the other equal the sequence kernels on both."""
    x = _double(_decode_inputs(2, 1, 2, 12, 20, 4, F32))
    options = _double(_constants(2, 12, "softplus"))
    tokens = draw(2, 2, 64, dtype=torch.float64)
    rows, _ = reference.short_conv(tokens, x["conv_weight"], initial_state=x["conv_state"])
    q, k, v = rows.split([12, 12, 40], -1)
    twice = lambda t: torch.stack([t, t], 1)  # noqa: E731
    o, final = reference.chunk_kda(
        q[:, :, None], k[:, :, None], v.view(2, 2, 2, 20), twice(x["g"]), twice(x["beta"]), initial_state=x["state"],
        output_final_state=True, qk_l2norm=True, beta_sigmoid=True, **options,
    )  # fmt: skip
    want = reference.gated_rms_norm(o, twice(x["out_gate"]), x["norm_weight"], 1e-5)
    state, conv_state = x["state"].clone(), x["conv_state"].clone()
    for t in range(2):
        moving = {"qkv": tokens[:, t], "state": state, "conv_state": conv_state}
        y, state, conv_state = reference.kda_decode(**{**x, **moving}, eps=1e-5, **options)
        torch.testing.assert_close(y, want[:, t])
    torch.testing.assert_close(state, final)
    assert torch.equal(conv_state[:, 1:], tokens)


def test_bad_input_is_refused():
    x, state = _inputs(2, 2, 2, 8, 8, "given", F32)
    for change, message in [
        ({"gate": "swish"}, "must be one of"),
        ({"lower_bound": -6.0}, "lower_bound"),
        ({"q": x["q"][:1]}, "q is"),
        ({"v": x["v"][:, :1]}, "multiple of the 2 heads"),
        ({"g": x["g"].double()}, "g is torch.float64"),
        ({"state": state[:1]}, "state is"),
        ({"state": state.bfloat16()}, "contiguous float32"),
        ({"state": state.transpose(2, 3)}, "contiguous float32"),
        ({"slots": torch.tensor([0])}, "slots is"),
    ]:
        with pytest.raises(ValueError, match=message):
            kda_step(**{**x, "state": state, **change})
    y = _decode_inputs(2, 1, 2, 8, 8, 4, F32)
    for change, message in [
        ({"qkv": y["qkv"][:, :30]}, "30 channels"),
        ({"conv_state": y["conv_state"][:1]}, "conv_state is"),
        ({"conv_state": y["conv_state"].transpose(0, 1).contiguous().transpose(0, 1)}, "contiguous"),
        ({"conv_weight": y["conv_weight"][:, :1]}, "2 to 8"),
        ({"norm_weight": y["norm_weight"][:4]}, "norm_weight is"),
    ]:
        with pytest.raises(ValueError, match=message):
            kda_decode(**{**y, **change}, eps=1e-5)


def test_operators_are_well_formed():
    x, state = _inputs(1, 1, 1, 8, 8, "given", F32)
    arguments = (*x.values(), state, None, None, None, "given", -5.0, 1.0, False, False)
    for check in ("test_schema", "test_faketensor"):
        torch.library.opcheck(torch.ops.kimi_mm.kda_step.default, arguments, test_utils=check)
