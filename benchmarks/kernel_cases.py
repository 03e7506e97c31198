"""The operations that `benchmarks.kernels` times: their inputs, implementations, bytes and FLOPs.

Every case draws random inputs once and returns one callable per column. Implementations are imported when they are
built, so that a missing one costs only its own column.

Shapes:  B batch  T time  H heads  K key and V value channels  N tokens  D width  E experts  I expert width
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]
COLUMNS = ("ours", "fla", "reference")


@dataclass(frozen=True)
class Case:
    """One row of the table.

    columns: name -> function that imports an implementation and returns what is to be timed.
    moved: least bytes read and written. flops: those of the algorithm itself.
    flush: empties the L2 cache between runs, as bytes decide the time.
    tables: modules whose CONFIGS hold the block sizes of our kernels.
    """

    title: str
    columns: dict[str, Callable[[], Call]]
    moved: float
    flops: float
    flush: bool = True
    tables: tuple[str, ...] = field(default=())


def ours(package: str, op: str) -> Callable[..., Any]:
    """Our Triton kernel; on a CPU it needs Triton's interpreter."""
    module = "triton_step" if op == "kda_step" else "triton"
    return getattr(importlib.import_module(f"kimi_mm.kernels.{package}.{module}"), op)


def reference(package: str, op: str) -> Callable[..., Any]:
    """Our plain PyTorch."""
    return getattr(importlib.import_module(f"kimi_mm.kernels.{package}.reference"), op)


def fla(module: str, op: str) -> Callable[..., Any]:
    """The same operation of the package fla-core."""
    return getattr(importlib.import_module(f"fla.{module}"), op)


def with_gradients(call: Call, leaves: list[Tensor]) -> Call:
    """Adds the backward pass to a call whose first (or only) result is a tensor."""
    upstream: list[Tensor] = []

    def run() -> object:
        out = call()
        out = out[0] if isinstance(out, tuple) else out
        assert isinstance(out, Tensor)
        if not upstream:
            upstream.append(torch.randn_like(out))
        return torch.autograd.grad(out, leaves, upstream[0])

    return run


def _kda_tables() -> tuple[str, ...]:
    return ("kimi_mm.kernels.kda.chunk_launch",)


def kda_inputs(device: str, B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random q, k, v, logits of gate and beta, A_log [H] and dt_bias [H * K]."""
    torch.manual_seed(0)
    new = {"device": device, "dtype": dtype}
    return {
        "q": torch.randn(B, T, H, K, **new),
        "k": torch.randn(B, T, H, K, **new),
        "v": torch.randn(B, T, H, V, **new),
        "g": torch.randn(B, T, H, K, **new) - 2.0,
        "beta": torch.randn(B, T, H, **new),
        "A_log": torch.zeros(H, device=device),
        "dt_bias": torch.randn(H * K, device=device) * 0.1,
    }


def kda_calls(x: dict[str, Tensor], gate: str, **extra: Any) -> dict[str, Callable[[], Call]]:
    """The three implementations of chunked KDA on the same inputs; all return (o, state or None)."""
    options = {"gate": gate, "qk_l2norm": True, "beta_sigmoid": True, **extra}

    def theirs() -> Call:
        chunk_kda = fla("ops.kda", "chunk_kda")
        fused = {f"use_{name}_in_kernel": True for name in ("qk_l2norm", "gate", "beta_sigmoid")}
        bounded = {"safe_gate": True, "lower_bound": -5.0} if gate == "bounded" else {}
        return lambda: chunk_kda(**x, **fused, **bounded, **extra, state_v_first=True)

    def mine(load: Callable[..., Any]) -> Callable[[], Call]:
        def build() -> Call:
            chunk_kda = load("kda", "chunk_kda")
            return lambda: chunk_kda(**x, **options)

        return build

    return {"ours": mine(ours), "fla": theirs, "reference": mine(reference)}


def _kda(
    title: str,
    device: str,
    B: int,
    T: int,
    H: int,
    gate: str = "bounded",
    sequences: int = 0,
    backward: bool = False,
    with_reference: bool = True,
) -> Case:
    K = V = 128 if device == "cuda" else 16
    x = kda_inputs(device, B, T, H, K, V, torch.bfloat16 if device == "cuda" else torch.float32)
    extra = {}
    if sequences:
        extra["cu_seqlens"] = torch.arange(0, T + 1, T // sequences, device=device)
    columns = kda_calls(x, gate, **extra)
    if not with_reference:
        del columns["reference"]
    rows, width = B * T * H, x["q"].element_size()
    moved = rows * (3 * K + 2 * V + 1) * width
    flops = rows * (6 * K * V + 3 * 64 * K + 64 * 64)
    if backward:
        leaves = [t.requires_grad_() for t in x.values()]
        columns = {name: _then(build, leaves) for name, build in columns.items()}
        moved += rows * (6 * K + 3 * V + 2) * width
        flops *= 3
    return Case(title, columns, moved, flops, tables=_kda_tables())


def _then(build: Callable[[], Call], leaves: list[Tensor]) -> Callable[[], Call]:
    return lambda: with_gradients(build(), leaves)


def _without_gradients(build: Callable[[], Call]) -> Callable[[], Call]:
    return lambda: torch.no_grad()(build())


def kda_forward(device: str) -> Case:
    if device == "cpu":
        return _kda("KDA forward, B1 T100 H2", device, 1, 100, 2)
    return _kda("KDA forward, B1 T8192 H32", device, 1, 8192, 32)


def kda_forward_softplus(device: str) -> Case:
    T, H = (8192, 32) if device == "cuda" else (100, 2)
    return _kda(f"KDA forward, softplus gate, B1 T{T} H{H}", device, 1, T, H, gate="softplus")


def kda_forward_packed(device: str) -> Case:
    T, H = (8192, 32) if device == "cuda" else (96, 2)
    return _kda(f"KDA forward, 8 packed sequences of {T // 8}, H{H}", device, 1, T, H, sequences=8)


def kda_forward_batch(device: str) -> Case:
    B, T, H = (8, 2048, 32) if device == "cuda" else (2, 40, 2)
    return _kda(f"KDA forward, B{B} T{T} H{H}", device, B, T, H)


def kda_forward_long(device: str) -> Case:
    T, H = (131072, 32) if device == "cuda" else (300, 1)
    return _kda(f"KDA forward, B1 T{T} H{H}", device, 1, T, H, with_reference=device == "cpu")


def kda_training(device: str) -> Case:
    T, H = (8192, 32) if device == "cuda" else (100, 2)
    return _kda(f"KDA forward + backward, B1 T{T} H{H}", device, 1, T, H, backward=True)


def kda_decode(device: str) -> Case:
    B, H, K = (64, 32, 128) if device == "cuda" else (2, 2, 16)
    x = kda_inputs(device, B, 1, H, K, K, torch.bfloat16 if device == "cuda" else torch.float32)
    state = torch.zeros(B, H, K, K, device=device)
    flat = {name: t[:, 0] if t.ndim > 1 else t for name, t in x.items()}
    options = {"gate": "bounded", "qk_l2norm": True, "beta_sigmoid": True}

    def mine(load: Callable[..., Any]) -> Callable[[], Call]:
        def build() -> Call:
            kda_step = load("kda", "kda_step")
            return lambda: kda_step(**flat, state=state, **options)

        return build

    def theirs() -> Call:
        step = fla("ops.kda", "fused_recurrent_kda")
        fused = {f"use_{name}_in_kernel": True for name in ("qk_l2norm", "gate", "beta_sigmoid")}
        kept = {"initial_state": state, "output_final_state": True, "state_v_first": True, "lower_bound": -5.0}
        return lambda: step(**x, **fused, **kept)

    columns = {"ours": mine(ours), "fla": theirs, "reference": mine(reference)}
    moved = 2 * state.numel() * 4 + B * H * (5 * K + 1) * x["q"].element_size()
    tables = ("kimi_mm.kernels.kda.triton_step",)
    return Case(f"KDA decoding step, B{B} H{H}, fp32 state", columns, moved, 7 * state.numel(), tables=tables)


def _attn_res(device: str, n: int, backward: bool = False) -> Case:
    N, D = (8192, 2304) if device == "cuda" else (20, 48)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    sources = [torch.randn(1, N, D, device=device, dtype=dtype) for _ in range(n)]
    query, weight = torch.randn(D, device=device) * 0.02, torch.ones(D, device=device)

    def mine(load: Callable[..., Any]) -> Callable[[], Call]:
        def build() -> Call:
            mix = load("attn_res", "attn_res_mix")
            return lambda: mix(sources, query, weight, 1e-6)

        return build

    def theirs() -> Call:
        mix = fla("ops.attnres", "fused_attnres")
        return lambda: mix(query, sources, weight, rms_eps=1e-6)

    columns: dict[str, Callable[[], Call]] = {"ours": mine(ours), "fla": theirs, "reference": mine(reference)}
    moved, flops = (n + 1) * N * D * sources[0].element_size(), 6 * n * N * D
    if backward:
        leaves = [t.requires_grad_() for t in (*sources, query, weight)]
        columns = {name: _then(build, leaves) for name, build in columns.items()}
        moved, flops = (3 * n + 2) * N * D * sources[0].element_size(), 16 * n * N * D
    else:
        columns = {name: _without_gradients(build) for name, build in columns.items()}
    title = f"AttnRes forward{' + backward' if backward else ''}, {n} sources, {N} tokens, D {D}"
    return Case(title, columns, moved, flops, tables=("kimi_mm.kernels.attn_res.triton",))


def attn_res_forward(device: str) -> Case:
    return _attn_res(device, 9)


def attn_res_forward_32(device: str) -> Case:
    return _attn_res(device, 32)


def attn_res_training(device: str) -> Case:
    return _attn_res(device, 9, backward=True)


def short_conv_training(device: str) -> Case:
    T, C = (8192, 4096) if device == "cuda" else (30, 24)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    x = torch.randn(1, T, C, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(C, 4, device=device, dtype=dtype, requires_grad=True)

    def mine(load: Callable[..., Any]) -> Callable[[], Call]:
        return lambda: with_gradients(lambda conv=load("conv", "short_conv"): conv(x, weight), [x, weight])

    def theirs() -> Call:
        conv = fla("modules.causal_conv1d", "causal_conv1d")
        return with_gradients(lambda: conv(x, weight, activation="silu"), [x, weight])

    columns = {"ours": mine(ours), "fla": theirs, "reference": mine(reference)}
    moved = 5 * x.numel() * x.element_size()
    title = f"short convolution + SiLU, forward + backward, T{T} C{C}"
    return Case(title, columns, moved, 40 * x.numel(), tables=("kimi_mm.kernels.conv.triton",))


def gated_norm_training(device: str) -> Case:
    rows, D = (8192 * 32, 128) if device == "cuda" else (60, 16)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    x, gate = (torch.randn(rows, D, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.ones(D, device=device, dtype=dtype, requires_grad=True)
    leaves = [x, gate, weight]

    def mine(load: Callable[..., Any]) -> Callable[[], Call]:
        return lambda: with_gradients(lambda norm=load("norm", "gated_rms_norm"): norm(x, gate, weight, 1e-5), leaves)

    def theirs() -> Call:
        norm = fla("modules.norm.fused_norm_gate", "rms_norm_gated")
        return with_gradients(lambda: norm(x, gate, weight, None, activation="sigmoid", eps=1e-5), leaves)

    columns = {"ours": mine(ours), "fla": theirs, "reference": mine(reference)}
    moved = 8 * x.numel() * x.element_size()
    title = f"gated RMS norm, forward + backward, {rows} rows of {D}"
    return Case(title, columns, moved, 30 * x.numel(), tables=("kimi_mm.kernels.norm.triton",))


def _moe(device: str, name: str, N: int, D: int, I: int, E: int, k: int, backward: bool) -> Case:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    x = torch.randn(N, D, device=device, dtype=dtype)
    logits, bias = torch.randn(N, E, device=device), torch.zeros(E, device=device)
    gate_up = torch.randn(E, 2 * I, D, device=device, dtype=dtype) * D**-0.5
    down = torch.randn(E, D, I, device=device, dtype=dtype) * I**-0.5

    def mine(load: Callable[..., Any]) -> Callable[[], Call]:
        def build() -> Call:
            route, experts = load("moe", "moe_route"), load("moe", "moe_experts")
            return lambda: experts(x, *route(logits, bias, k), gate_up, down)

        return build

    columns: dict[str, Callable[[], Call]] = {"ours": mine(ours), "reference": mine(reference)}
    flops = 6 * N * k * D * I
    moved = (2 * N * D + 3 * E * D * I) * x.element_size()
    if backward:
        leaves = [t.requires_grad_() for t in (x, logits, gate_up, down)]
        columns = {name: _then(build, leaves) for name, build in columns.items()}
        flops, moved = 3 * flops, 3 * moved
    else:
        columns = {name: _without_gradients(build) for name, build in columns.items()}
    tables = tuple(f"kimi_mm.kernels.moe.triton{part}" for part in ("", "_tma", "_gemm", "_rows", "_route"))
    title = f"MoE {name}forward{' + backward' if backward else ''}, {N} tokens, {E} experts top {k}, {D} -> {I}"
    return Case(title, columns, moved, flops, flush=False, tables=tables)


def moe_forward(device: str) -> Case:
    sizes = (16384, 2304, 1024, 64, 8) if device == "cuda" else (20, 16, 8, 4, 2)
    return _moe(device, "", *sizes, backward=False)


def moe_training(device: str) -> Case:
    sizes = (16384, 2304, 1024, 64, 8) if device == "cuda" else (20, 16, 8, 4, 2)
    return _moe(device, "", *sizes, backward=True)


def moe_nano_training(device: str) -> Case:
    sizes = (8192, 320, 128, 8, 2) if device == "cuda" else (20, 16, 8, 4, 2)
    return _moe(device, "of nano, ", *sizes, backward=True)


def cross_entropy_training(device: str) -> Case:
    N, D, V = (8192, 2304, 65536) if device == "cuda" else (20, 16, 50)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(N, D, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(V, D, device=device, dtype=dtype) * D**-0.5).requires_grad_()
    labels = torch.randint(V, (N,), device=device)
    leaves = [hidden, weight]

    def mine(load: Callable[..., Any]) -> Callable[[], Call]:
        def build() -> Call:
            loss = load("cross_entropy", "linear_cross_entropy")
            return with_gradients(lambda: loss(hidden, weight, labels), leaves)

        return build

    def theirs() -> Call:
        loss = fla("modules.fused_linear_cross_entropy", "fused_linear_cross_entropy_loss")
        return with_gradients(lambda: loss(hidden, labels, weight), leaves)

    columns = {"ours": mine(ours), "fla": theirs, "reference": mine(reference)}
    moved, flops = 2 * (N + V) * D * hidden.element_size(), 6 * N * V * D
    title = f"linear cross entropy, forward + backward, {N} rows, D {D}, V {V}"
    return Case(title, columns, moved, flops, flush=False, tables=("kimi_mm.kernels.cross_entropy.triton",))


CASES: dict[str, Callable[[str], Case]] = {
    build.__name__: build
    for build in (
        kda_forward,
        kda_forward_softplus,
        kda_forward_packed,
        kda_forward_batch,
        kda_forward_long,
        kda_training,
        kda_decode,
        attn_res_forward,
        attn_res_forward_32,
        attn_res_training,
        short_conv_training,
        gated_norm_training,
        moe_forward,
        moe_training,
        moe_nano_training,
        cross_entropy_training,
    )
}
