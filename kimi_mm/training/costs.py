"""Parameters and FLOPs of a backbone, counted from its config alone; no model is built.

    matrices      [rows, columns] each, 2 * rows * columns FLOPs a token
    softmax       2 H (channels of q + of v) FLOPs a token and visible key; (T + 1) / 2 keys on average
    KDA           HV (6 K V + 3 C V + C^2) FLOPs a token, C = 64 (Kimi Linear, equation 13)
    AttnRes       4 D FLOPs a token and source
    training      three times the forward pass; recomputed activations are not counted, for they compute nothing new

Counts cover trunk, both branches, embedding and heads; the audio head runs on every position, as the text head does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kimi_mm.config import BackboneConfig

CHUNK = 64
Shape = tuple[int, int]


@dataclass(frozen=True)
class LayerCosts:
    """One layer: a mixer and an mlp.

    Args:
        kind: "kda/moe" and so on.
        matrices: shapes of what every token goes through.
        tables: numbers in matrices that Muon does not update (convolutions).
        expert: shapes of one routed expert's matrices; none in a dense layer.
        num_experts, active_experts: in all, and of each token.
        vectors: numbers in vectors.
        sources: of both sublayers' attention over depth, together.
    """

    kind: str
    matrices: tuple[Shape, ...]
    tables: int
    expert: tuple[Shape, ...]
    num_experts: int
    active_experts: int
    vectors: int
    sources: int

    @property
    def experts(self) -> int:
        """Parameters of all routed experts."""
        return self.num_experts * _numbers(self.expert)

    @property
    def common(self) -> int:
        """Parameters that every token uses."""
        return _numbers(self.matrices) + self.tables + self.vectors

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        return self.common + self.active_experts * _numbers(self.expert)


@dataclass(frozen=True)
class Costs:
    """A whole backbone."""

    config: BackboneConfig
    layers: tuple[LayerCosts, ...]
    ends: int  # embedding, adaptor, heads, final norms and mixes

    @property
    def total(self) -> int:
        """All parameters."""
        return self.ends + sum(layer.common + layer.experts for layer in self.layers)

    @property
    def experts(self) -> int:
        """Parameters of routed experts."""
        return sum(layer.experts for layer in self.layers)

    @property
    def active(self) -> int:
        """Parameters that one token uses, the whole embedding table included as is customary."""
        return self.ends + sum(layer.active for layer in self.layers)

    def forward_flops(self, context: int) -> float:
        """FLOPs of a forward pass for each token of rows of `context` tokens."""
        config = self.config
        heads = 2 if config.audio_head else 1
        flops = 2.0 * heads * config.vocab_size * config.hidden_size
        for layer in self.layers:
            flops += 2.0 * (_numbers(layer.matrices) + layer.tables)
            flops += 2.0 * layer.active_experts * _numbers(layer.expert)
            flops += 4.0 * layer.sources * config.hidden_size + _mixing_flops(config, layer.kind, context)
        return flops

    def training_flops(self, context: int) -> float:
        """FLOPs of forward and backward for each token of rows of `context` tokens."""
        return 3.0 * self.forward_flops(context)


def count(config: BackboneConfig) -> Costs:
    """Counts a backbone."""
    D = config.hidden_size
    mixes = config.residual == "attn_res"
    trunk, layers = len(config.trunk), []
    branches = [config.text_branch, *([config.audio_branch] if config.audio_head else [])]
    for depth, kind in enumerate(config.trunk):
        layers.append(_layer(config, kind, depth))
    for branch in branches:
        layers += [_layer(config, kind, trunk + depth) for depth, kind in enumerate(branch)]
    ends = config.vocab_size * D * (1 if config.tie_word_embeddings else 1 + len(branches))
    for branch in branches:
        ends += D + (2 * D if mixes and (branch or trunk) else 0)
    if config.adaptor_input_size is not None:
        ends += config.adaptor_input_size * D + D + D * D + D + 2 * D
    return Costs(config, tuple(layers), ends)


def _layer(config: BackboneConfig, kind: str, depth: int) -> LayerCosts:
    D = config.hidden_size
    mixer, _, mlp = kind.partition("/")
    matrices, tables, vectors = _mixer(config, mixer)
    expert: tuple[Shape, ...] = ()
    num = active = 0
    if mlp == "dense":
        matrices += [(config.intermediate_size, D)] * 2 + [(D, config.intermediate_size)]
    else:
        moe = config.moe
        assert moe is not None
        I, shared = moe.intermediate_size, moe.num_shared_experts * moe.intermediate_size
        matrices += [(moe.num_experts, D)] + ([(shared, D)] * 2 + [(D, shared)] if shared else [])
        expert, num, active = ((2 * I, D), (D, I)), moe.num_experts, moe.num_experts_per_token
    sources = 0
    if config.residual == "attn_res":
        vectors += 2 * D * (2 if depth else 1)
        sources = sum(_sources(config, sublayer) for sublayer in (2 * depth, 2 * depth + 1))
    return LayerCosts(kind, tuple(matrices), tables, expert, num, active, vectors + 2 * D, sources)


def _sources(config: BackboneConfig, sublayer: int) -> int:
    """Blocks that a sublayer attends to: the embedding, whole blocks, and the open one."""
    size = config.attn_res_block_size
    return 0 if sublayer == 0 else 1 + -(-sublayer // size)


def _mixer(config: BackboneConfig, kind: str) -> tuple[list[Shape], int, int]:
    """Shapes of a mixer's matrices, and how many numbers its convolutions and its vectors have."""
    D = config.hidden_size
    if kind == "kda":
        c = config.kda
        assert c is not None
        H, HV, K, V = c.num_heads, c.value_heads, c.head_dim, c.value_dim
        rank = c.gate_rank or K
        shapes = [(H * K, D)] * 2 + [(HV * V, D), (D, HV * V), (rank, D), (HV * K, rank), (HV, D)]
        shapes += [(rank, D), (HV * V, rank)]
        bias = HV * V if c.output_gate_bias else 0
        return shapes, (2 * H * K + HV * V) * c.conv_kernel_size, HV + HV * K + V + bias
    if kind == "mla":
        m = config.mla
        assert m is not None
        H, N, R, L = m.num_heads, m.qk_nope_head_dim, m.qk_rope_head_dim, m.kv_lora_rank
        shapes, vectors = [(H * (N + R), D)], L
        if m.q_lora_rank is not None:
            shapes, vectors = [(m.q_lora_rank, D), (H * (N + R), m.q_lora_rank)], L + m.q_lora_rank
        return [*shapes, (L + R, D), (H * (N + m.v_head_dim), L), (D, H * m.v_head_dim)], 0, vectors
    g = config.gqa
    assert g is not None
    H, G, E = g.num_heads, g.num_kv_heads, g.head_dim
    return [(H * E, D), (G * E, D), (G * E, D), (D, H * E)], 0, (H + 2 * G) * E if g.qkv_bias else 0


def _mixing_flops(config: BackboneConfig, kind: str, context: int) -> float:
    mixer, keys = kind.partition("/")[0], (context + 1) / 2
    if mixer == "kda" and config.kda is not None:
        c = config.kda
        return c.value_heads * (6.0 * c.head_dim * c.value_dim + 3.0 * CHUNK * c.value_dim + CHUNK**2)
    if mixer == "mla" and config.mla is not None:
        m = config.mla
        return 2.0 * m.num_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim + m.v_head_dim) * keys
    assert config.gqa is not None
    return 2.0 * config.gqa.num_heads * 2 * config.gqa.head_dim * keys


def muon_flops(shape: Shape, steps: int = 5) -> float:
    """FLOPs of Newton-Schulz on one matrix."""
    m, n = sorted(shape)
    return steps * (4.0 * m * m * n + 2.0 * m**3)


def optimizer_flops(costs: Costs) -> float:
    """FLOPs of one Muon step over all matrices of a backbone."""
    total = 0.0
    for layer in costs.layers:
        total += sum(muon_flops(shape) for shape in layer.matrices)
        total += layer.num_experts * sum(muon_flops(shape) for shape in layer.expert)
    return total


def _numbers(shapes: tuple[Shape, ...]) -> int:
    return sum(rows * columns for rows, columns in shapes)


def iter_matrices(costs: Costs) -> Iterator[Shape]:
    """Yields the shapes of the matrices that Muon updates and FSDP cuts between rows, experts apart."""
    for layer in costs.layers:
        yield from layer.matrices
