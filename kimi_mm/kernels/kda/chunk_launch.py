"""Launches the chunk kernels of KDA: sizes, workspaces, tile choices.

    forward    inside ─► scan
    backward   scan_back ─► gradients     (inside ─► scan again first, where nothing was kept)

A scan walks the chunks of a sequence one after another. Where heads and sequences are too few to fill the device, each
sequence is cut into parts: `summary` finds what every part does to any state, S -> M S + S_ext, these maps are folded
from part to part, and the parts are scanned side by side, each from its true state; backward likewise, from the end.

Shapes: as in chunk_forward. Workspaces are laid out per chunk and padded to powers of two, so that their tiles are
dense and a ragged tail never runs over.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_mm.kernels.kda.chunk_backward import gradients_kernel, scan_back_kernel
from kimi_mm.kernels.kda.chunk_configs import bits_of, most_rows, parts_of_sequence, rows_of_chunk, tiles
from kimi_mm.kernels.kda.chunk_forward import inside_kernel, places_kernel, scan_kernel, summary_kernel
from kimi_mm.kernels.kda.chunk_ops import GATE_CODES
from kimi_mm.kernels.launch import cdiv, power_of_two


@dataclass(frozen=True)
class Plan:
    """Sizes and options of one call, all known without looking at the device."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    N: int
    NC: int
    per_row: int
    BT: int
    BK: int
    VP: int
    bits: int
    gate: int
    bounded: bool
    norm: bool
    sigmoid: bool
    varlen: bool
    scale: float
    lower: float

    @property
    def kind(self) -> torch.dtype:
        """Type of the tiles in memory and of tensor core operands."""
        return torch.bfloat16 if self.bits == 16 else torch.float32

    @property
    def sub(self) -> int:
        return 16 if self.bounded else 1

    @property
    def levels(self) -> int:
        return (self.BT // self.sub).bit_length() - 1

    def config(self, kernel: str) -> dict[str, int]:
        return tiles(kernel, self.bits, self.BK, self.VP, self.BT)

    def parts(self, kernel: str, device: torch.device) -> int:
        """Parts of each sequence for a scan, chosen by shapes alone."""
        programs = self.N * self.HV * (self.VP // self.config(kernel)["BV"])
        return parts_of_sequence(programs, self.NC // max(1, self.N), device)

    def shapes(self) -> dict[str, Any]:
        """Compile-time arguments that all kernels share."""
        return {
            "BT": self.BT,
            "BK": self.BK,
            "VP": self.VP,
            "VARLEN": self.varlen,
            "PRECISION": "tf32" if self.bits == 16 else "tf32x3",
        }


@dataclass
class Chunks:
    """Workspace of `inside`, per chunk and head; see chunk_forward for the letters."""

    w: Tensor
    kg: Tensor
    qg: Tensor
    P: Tensor
    fade: Tensor
    X: Tensor | None
    u: Tensor


def make_plan(
    q: Tensor,
    v: Tensor,
    *,
    gate: str,
    bounded: bool,
    norm: bool,
    sigmoid: bool,
    scale: float,
    lower: float,
    chunk: int,
    train: bool,
    sequences: int | None,
) -> Plan:
    """Sizes of a call.

    Args:
        sequences: those packed in one row, None for a dense batch.
        chunk: its rows; 0 leaves them to the tables, which bound them on a GPU.
    """
    B, T, HV, V = v.shape
    H, K = q.shape[-2:]
    bits, BK = bits_of(v.dtype), padded(K)
    if not chunk:
        chunk = rows_of_chunk(T, bits, BK, train, v.device)
    elif v.is_cuda:  # tiles of a smaller chunk do not serve a larger one: 64 rows in fp32 met an illegal address
        chunk = min(chunk, most_rows(bits, BK))
    per_row = cdiv(T, chunk)
    return Plan(
        B=B,
        T=T,
        H=H,
        HV=HV,
        K=K,
        V=V,
        N=B if sequences is None else sequences,
        NC=B * per_row if sequences is None else T // chunk + min(sequences, T),
        per_row=per_row,
        BT=chunk,
        BK=BK,
        VP=padded(V),
        bits=bits,
        gate=GATE_CODES[gate],
        bounded=bounded,
        norm=norm,
        sigmoid=sigmoid,
        varlen=sequences is not None,
        scale=scale,
        lower=lower,
    )


def padded(channels: int) -> int:
    """Power of two that a tile of so many channels takes; tensor cores want 16 at least."""
    return max(16, power_of_two(channels))


def rows_of(x: Tensor, heads: int) -> Tensor:
    """`x` [B, T, (heads, D)] itself where the channels of a row lie together, else a copy."""
    if x.stride(-1) != 1 or (heads > 1 and x.dim() == 4 and x.stride(2) != x.shape[3]):
        return x.contiguous()
    return x


def strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(s for x in tensors for s in x.stride()[:2])


def _launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    kernel[(programs,)](*args, **options)


Places = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def find_places(plan: Plan, cu_seqlens: Tensor | None, lengths: Tensor | None) -> Places:
    """cu_seqlens, lengths, first chunk of each sequence [N + 1], sequence of each chunk [NC] or -1 for spares."""
    if cu_seqlens is None:
        return None, lengths, None, None
    offsets = torch.empty(plan.N + 1, device=cu_seqlens.device, dtype=torch.int32)
    owner = torch.empty(plan.NC, device=cu_seqlens.device, dtype=torch.int32)
    _launch(places_kernel, plan.N + 1, cu_seqlens, offsets, owner, plan.N, plan.NC, BT=plan.BT, BLOCK=256)
    return cu_seqlens, None, offsets, owner


def run_inside(
    plan: Plan,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    places: Places,
    keep_X: bool,
) -> Chunks:
    """Everything inside the chunks; `places` is (cu_seqlens, lengths, offsets, owner)."""
    v = inputs[2]
    make = functools.partial(torch.empty, device=v.device, dtype=plan.kind)
    lead = (plan.NC, plan.HV)
    out = Chunks(
        w=make(*lead, plan.BT, plan.BK),
        kg=make(*lead, plan.BT, plan.BK),
        qg=make(*lead, plan.BT, plan.BK),
        P=make(*lead, plan.BT, plan.BT),
        fade=torch.empty(*lead, plan.BK, device=v.device),
        X=make(*lead, plan.BT, plan.BT) if keep_X else None,
        u=make(*lead, plan.BT, plan.VP),
    )
    _launch(
        inside_kernel, plan.NC * plan.HV,
        *inputs, A_log, dt_bias, *places,
        out.w, out.u, out.kg, out.qg, out.P, out.X, out.fade,
        *strides(*inputs), plan.scale, plan.lower, plan.T, plan.per_row, plan.HV,
        H=plan.H, K=plan.K, V=plan.V, LEVELS=plan.levels, SUB=plan.sub, LOG_BT=plan.BT.bit_length() - 1,
        GATE=plan.gate, NORM=plan.norm, SIGMOID=plan.sigmoid, **plan.shapes(), **plan.config("inside"),
    )  # fmt: skip
    return out


def run_scan(
    plan: Plan,
    chunks: Chunks,
    initial: Tensor | None,
    places: Places,
    *,
    out: Tensor | None,
    final: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Fills `out` and `final` where given; returns the states and deltas of all chunks if they are to be kept."""
    states = deltas = None
    device = chunks.w.device
    if keep_states:
        states = torch.empty(plan.NC, plan.HV, plan.BK, plan.VP, device=device, dtype=plan.kind)
        deltas = torch.empty(plan.NC, plan.HV, plan.BT, plan.VP, device=device, dtype=plan.kind)
    parts = plan.parts("scan", device)
    if parts > 1:
        initial = fold(plan, run_summary(plan, chunks, places, parts), initial)
    config = plan.config("scan")
    stages = config.pop("num_stages")
    _launch(
        scan_kernel, plan.VP // config["BV"] * plan.HV * plan.N * parts,
        chunks.w, chunks.u, chunks.kg, chunks.qg, chunks.P, chunks.fade, initial, places[0], places[2],
        out, final, states, deltas, plan.T, plan.per_row, plan.HV, parts,
        K=plan.K, V=plan.V, STAGES=stages, **plan.shapes(), **config,
    )  # fmt: skip
    return states, deltas


def run_summary(plan: Plan, chunks: Chunks, places: Places, parts: int, maps_only: bool = False) -> Tensor:
    """S_ext and M of every part [N, parts, HV, VP + BK, BK], transposed; `maps_only` leaves S_ext unwritten."""
    summary = torch.empty(plan.N, parts, plan.HV, plan.VP + plan.BK, plan.BK, device=chunks.w.device)
    config = plan.config("scan")
    stages = config.pop("num_stages")
    BV = config["BV"] = min(config["BV"], plan.BK)
    first_tile = plan.VP // BV if maps_only else 0
    _launch(
        summary_kernel, ((plan.VP + plan.BK) // BV - first_tile) * plan.HV * plan.N * parts,
        chunks.w, chunks.u, chunks.kg, chunks.fade, places[0], places[2], summary,
        plan.T, plan.per_row, plan.HV, parts, first_tile, STAGES=stages, **plan.shapes(), **config,
    )  # fmt: skip
    return summary


def fold(plan: Plan, summary: Tensor, initial: Tensor | None) -> Tensor:
    """The state each part starts from, [N * parts, HV, V, K], by S <- M S + S_ext from part to part."""
    N, parts = summary.shape[:2]
    state = summary.new_zeros(N, plan.HV, plan.V, plan.K) if initial is None else initial
    starts = summary.new_empty(N, parts, plan.HV, plan.V, plan.K)
    for part in range(parts):
        starts[:, part] = state
        added, through = (
            summary[:, part, :, : plan.V, : plan.K],
            summary[:, part, :, plan.VP :][..., : plan.K, : plan.K],
        )
        state = added + state @ through
    return starts.flatten(0, 1)


def run_scan_back(
    plan: Plan,
    chunks: Chunks,
    d_out: Tensor,
    d_final: Tensor | None,
    d_initial: Tensor | None,
    places: Places,
) -> tuple[Tensor, Tensor]:
    """Gradients of the state after each chunk [NC, HV, BK, VP], and Y [NC, HV, BT, VP]; see chunk_backward."""
    d_states = torch.empty(plan.NC, plan.HV, plan.BK, plan.VP, device=d_out.device, dtype=plan.kind)
    ys = torch.empty(plan.NC, plan.HV, plan.BT, plan.VP, device=d_out.device, dtype=plan.kind)
    parts = plan.parts("scan_back", d_out.device)
    config = plan.config("scan_back")
    stages = config.pop("num_stages")

    def walk(d_ends: Tensor | None, d_starts: Tensor | None, states: Tensor | None, y: Tensor | None) -> None:
        _launch(
            scan_back_kernel, plan.VP // config["BV"] * plan.HV * plan.N * parts,
            chunks.w, chunks.kg, chunks.qg, chunks.P, chunks.X, chunks.fade, d_out, d_ends, *places[:3],
            states, y, d_starts, plan.T, plan.per_row, plan.HV, parts,
            K=plan.K, V=plan.V, STAGES=stages, **plan.shapes(), **config,
        )  # fmt: skip

    if parts == 1:
        walk(d_final, d_initial, d_states, ys)
        return d_states, ys
    added = torch.empty(plan.N, parts, plan.HV, plan.V, plan.K, device=d_out.device)
    walk(None, added.flatten(0, 1), None, None)
    maps = run_summary(plan, chunks, places, parts, maps_only=True)[:, :, :, plan.VP :][..., : plan.K, : plan.K]
    d_state = torch.zeros_like(added[:, 0]) if d_final is None else d_final
    d_ends = torch.empty_like(added)
    for part in reversed(range(parts)):
        d_ends[:, part] = d_state
        d_state = added[:, part] + d_state @ maps[:, part].mT
    if d_initial is not None:
        d_initial.copy_(d_state)
    walk(d_ends.flatten(0, 1), None, d_states, ys)
    return d_states, ys


def run_gradients(
    plan: Plan,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    places: Places,
    out: Tensor,
    states: tuple[Tensor, Tensor, Tensor, Tensor],
    d_out: Tensor,
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dg, dbeta, dA_log, d dt_bias); `states` is (states, deltas, d_states, ys)."""
    q, k, v, g, beta = inputs
    B, T, HV, K = g.shape
    grouped = HV != plan.H
    make = functools.partial(torch.empty, device=v.device)
    dq = make(B, T, HV, K, dtype=torch.float32 if grouped else q.dtype)
    dk = make(B, T, HV, K, dtype=torch.float32 if grouped else k.dtype)
    dv, dg, dbeta = make(v.shape, dtype=v.dtype), make(g.shape, dtype=g.dtype), make(beta.shape, dtype=beta.dtype)
    parts = torch.zeros if plan.varlen else torch.empty  # spare chunks write nothing
    dA = None if A_log is None else parts(plan.NC, HV, device=v.device)
    dbias = None if dt_bias is None else parts(plan.NC, HV, K, device=v.device)
    pairs = make(plan.NC, HV, 2, plan.BT, plan.BT, dtype=plan.kind)
    _launch(
        gradients_kernel, plan.NC * plan.HV,
        *inputs, A_log, dt_bias, *places,
        out, *states, d_out, dq, dk, dv, dg, dbeta, dA, dbias, pairs,
        *strides(*inputs), plan.scale, plan.lower, plan.T, plan.per_row, plan.HV,
        H=plan.H, K=plan.K, V=plan.V, LEVELS=plan.levels, SUB=plan.sub,
        GATE=plan.gate, NORM=plan.norm, SIGMOID=plan.sigmoid, **plan.shapes(), **plan.config("gradients"),
    )  # fmt: skip
    if grouped:
        dq = dq.view(B, T, plan.H, -1, K).sum(3).to(q.dtype)
        dk = dk.view(B, T, plan.H, -1, K).sum(3).to(k.dtype)
    dA_log = None if dA is None or A_log is None else dA.sum(0).to(A_log.dtype).view(A_log.shape)
    d_dt_bias = None if dbias is None or dt_bias is None else dbias.sum(0).to(dt_bias.dtype).view(dt_bias.shape)
    return dq, dk, dv, dg, dbeta, dA_log, d_dt_bias
