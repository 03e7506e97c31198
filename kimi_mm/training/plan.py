"""How a backbone would train on so many GPUs: memory, communication and MFU by formulas; see docs/scaling.md.

    config ─► costs ─► layout (FSDP2 over all W GPUs, experts over P of them, rows over R of them)
                         ├─► memory of a GPU      weights, gradients, optimiser, gathered layers, activations
                         ├─► bytes a GPU sends    FSDP2, experts, context, Muon
                         └─► seconds of a step    products, sent bytes that nothing hides, optimiser ─► tokens/s, MFU

The formulas describe this package's own implementation: fp32 masters and momenta in shards, bf16 products, activations
recomputed layer by layer, experts' tokens exchanged without overlap, Muon's matrices dealt to the ranks.

Units: bytes, seconds, FLOPs; of one GPU unless said otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kimi_mm.config import BackboneConfig, ConfigError
from kimi_mm.training.costs import Costs, LayerCosts, count, iter_matrices, optimizer_flops
from kimi_mm.training.devices import Device

GPUS_PER_HOST = 8
CHUNK_ROWS = 64  # of KDA
BF16, FP32 = 2, 4
# Shares of what the data sheets promise that large transfers and grouped products reach in practice: assumptions.
LINK_SHARE, PRODUCT_SHARE, MUON_SHARE = 0.75, 0.5, 0.6
LOGIT_CHUNK = 3 * 8 * 2**20  # of the chunked loss
RESERVE = 6e9  # CUDA context, NCCL buffers, fragments


@dataclass(frozen=True)
class Layout:
    """How W GPUs share one run.

    Args:
        gpus: W. expert: P GPUs that share experts. context: R GPUs that share rows.
        rows, tokens: of a micro-batch: rows of `tokens` positions each.
        micro_batches: of a step, for each group of R GPUs.
    """

    gpus: int
    expert: int = 1
    context: int = 1
    rows: int = 1
    tokens: int = 4096
    micro_batches: int = 1

    @property
    def local_tokens(self) -> int:
        """Positions that a GPU works on at a time."""
        return self.rows * self.tokens // self.context

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimiser step, over all GPUs."""
        return self.gpus // self.context * self.rows * self.tokens * self.micro_batches


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float  # fp32 masters
    gradients: float
    optimizer: float
    gathered: float  # two layers in bf16, one in fp32 gradients, and the ends
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations + RESERVE


@dataclass(frozen=True)
class Plan:
    """What comes out for one layout on one kind of GPU."""

    costs: Costs
    layout: Layout
    device: Device
    memory: Memory
    sent: dict[str, float]  # bytes of a step, by what they are for
    seconds: dict[str, float]  # of a step, by what they are for; only what nothing hides

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.device.memory

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Of each GPU."""
        return self.layout.step_tokens / self.layout.gpus / self.step_seconds

    @property
    def mfu(self) -> float:
        """Share of the GPU's peak that goes into the model's own FLOPs."""
        return self.tokens_per_second * self.costs.training_flops(self.layout.tokens) / self.device.flops


def make_plan(
    config: BackboneConfig,
    layout: Layout,
    device: Device,
    *,
    product_share: float = PRODUCT_SHARE,
    recompute: bool = True,
) -> Plan:
    """Works out one layout.

    Args:
        config: the backbone.
        product_share: share of the device's peak that the layers' products reach; measure it with
            `benchmarks/training.py` on one GPU.
        recompute: activations are computed again in the backward pass.

    Raises:
        ConfigError: if the layout cannot be.
    """
    costs = count(config)
    for key in ("expert", "context"):
        if layout.gpus % getattr(layout, key):
            raise ConfigError(f"{key}={getattr(layout, key)} does not divide {layout.gpus} GPUs.")
    if layout.expert > 1 and (config.moe is None or config.moe.num_experts % layout.expert):
        raise ConfigError(f"expert={layout.expert} does not divide the experts of the model.")
    if layout.tokens % layout.context:
        raise ConfigError(f"context={layout.context} does not divide rows of {layout.tokens} tokens.")
    sent = _sent(costs, layout, recompute)
    return Plan(
        costs,
        layout,
        device,
        _memory(costs, layout, recompute),
        sent,
        _seconds(costs, layout, device, sent, product_share, recompute),
    )


def choose_layout(
    config: BackboneConfig,
    gpus: int,
    device: Device,
    tokens: int,
    step_tokens: float,
    expert: int = 0,
    context: int = 0,
    product_share: float = PRODUCT_SHARE,
) -> Plan:
    """Returns the fitting layout with the best MFU, or the one that needs the least memory if none fits.

    Args:
        tokens: of a row. step_tokens: of an optimiser step, at least, over all GPUs.
        expert, context: GPUs that share experts and rows; 0 tries powers of two.

    Raises:
        ConfigError: if the given numbers do not fit the model or the GPUs.
    """
    experts = 1 if config.moe is None else config.moe.num_experts
    plans = []
    for shared in [expert] if expert else _powers(math.gcd(gpus, experts)):
        for cut in [context] if context else _powers(math.gcd(gpus, max(1, tokens // 8192))):
            for rows in (1, 2, 4, 8):
                micro = max(1, math.ceil(step_tokens * cut / (gpus * rows * tokens)))
                layout = Layout(gpus, shared, cut, rows, tokens, micro)
                plans.append(make_plan(config, layout, device, product_share=product_share))
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return max(fitting, key=lambda plan: (round(plan.mfu, 3), -plan.memory.total))
    return min(plans, key=lambda plan: plan.memory.total)


def _powers(number: int) -> list[int]:
    """Powers of two that divide a number."""
    return [2**n for n in range(number.bit_length()) if number % 2**n == 0]


def _expert_shards(costs: Costs, layout: Layout) -> int:
    """GPUs that FSDP cuts a GPU's experts into: stacks are cut between experts only."""
    copies = layout.gpus // layout.expert
    moe = costs.config.moe
    return copies if moe is None else math.gcd(copies, moe.num_experts // layout.expert)


def _memory(costs: Costs, layout: Layout, recompute: bool) -> Memory:
    W = layout.gpus
    vectors = sum(layer.vectors for layer in costs.layers) + sum(
        layer.num_experts * costs.config.hidden_size for layer in costs.layers
    )  # routers stay whole too
    held_experts = costs.experts / (layout.expert * _expert_shards(costs, layout))
    shards = (costs.total - costs.experts - vectors) / W + held_experts + vectors
    matrices = sum(m * n for m, n in iter_matrices(costs)) / W + held_experts
    biggest = max(costs.layers, key=lambda layer: layer.common + layer.experts / layout.expert)
    layer = biggest.common + biggest.experts / layout.expert
    return Memory(
        weights=FP32 * shards,
        gradients=FP32 * shards,
        optimizer=FP32 * matrices + 2 * FP32 * (shards - matrices),
        gathered=2 * BF16 * layer + (BF16 + FP32) * layer + (2 * BF16 + FP32) * costs.ends,
        activations=layout.local_tokens * _activation_bytes(costs, layout, recompute) + LOGIT_CHUNK,
    )


def _activation_bytes(costs: Costs, layout: Layout, recompute: bool) -> float:
    """Bytes that a token takes: what passes between layers, and inside one layer or all of them."""
    config = costs.config
    D, depth = config.hidden_size, len(costs.layers)
    stream = BF16 * D * depth
    if config.residual == "attn_res":
        stream += BF16 * D * (1 + 2 * depth // config.attn_res_block_size)
    inside = [_inside(config, layer, layout) for layer in costs.layers]
    return stream + (2 * max(inside) if recompute else sum(inside))  # twice: values and their gradients


def _inside(config: BackboneConfig, layer: LayerCosts, layout: Layout) -> float:
    """Bytes of a token's intermediates within a layer."""
    D, (mixer, _, mlp) = config.hidden_size, layer.kind.partition("/")
    if mixer == "kda" and config.kda is not None:
        c = config.kda
        keys, values = c.value_heads * c.head_dim, c.value_heads * c.value_dim
        wide = 2 * (2 * keys + values) + 2 * keys + 3 * values  # raw and convolved q k v; decay; gate, out, normed
        wide += 3 * keys + values + 2 * c.value_heads * CHUNK_ROWS + values * c.head_dim // CHUNK_ROWS  # kept by KDA
    elif mixer == "mla" and config.mla is not None:
        m = config.mla
        own = m.num_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim + m.v_head_dim)  # q and out
        seen = m.num_heads * (2 * m.qk_nope_head_dim + m.qk_rope_head_dim + 2 * m.v_head_dim)  # k, v, their product
        wide = own + (layout.context + 1) / 2 * seen  # a GPU in the middle expands half of the keys
    else:
        assert config.gqa is not None
        g = config.gqa
        wide = g.head_dim * (2 * g.num_heads + 2 * g.num_kv_heads * (layout.context + 1) / 2)
    if mlp == "dense":
        inner = 3 * config.intermediate_size
    else:
        assert config.moe is not None
        I = config.moe.intermediate_size
        inner = layer.active_experts * (2 * D + 3 * I) + 3 * I * config.moe.num_shared_experts
        inner += layer.active_experts * 2 * D if layout.expert > 1 else 0  # rows sent, and rows that came back
    return BF16 * (4 * D + wide + inner)


def _sent(costs: Costs, layout: Layout, recompute: bool) -> dict[str, float]:
    config, W, P, R = costs.config, layout.gpus, layout.expert, layout.context
    away = lambda ranks: (ranks - 1) / ranks  # noqa: E731
    common = costs.total - costs.experts
    shards = _expert_shards(costs, layout)
    replicas = W // P // shards
    # Every micro-batch gathers weights for its forward and its backward pass, and scatters gradients.
    experts = costs.experts / P
    travelling = common * away(W) + experts * away(shards)
    fsdp = layout.micro_batches * ((2 * BF16 + FP32) * travelling + 2 * FP32 * experts / shards * away(replicas))
    passes = 3 if recompute else 2
    moving = sum(layer.active_experts for layer in costs.layers) * config.hidden_size * BF16
    tokens = layout.local_tokens * layout.micro_batches
    context = 0.0
    for layer in costs.layers:
        mixer = layer.kind.partition("/")[0]
        if mixer == "kda" and config.kda is not None:
            c = config.kda
            summary = FP32 * c.value_heads * c.head_dim * (c.head_dim + c.value_dim)
            context += layout.rows * layout.micro_batches * summary * (R - 1)
        elif mixer == "mla" and config.mla is not None:
            context += BF16 * tokens * (config.mla.kv_lora_rank + config.mla.qk_rope_head_dim) * (R - 1)
        elif config.gqa is not None:
            context += BF16 * tokens * 2 * config.gqa.num_kv_heads * config.gqa.head_dim * (R - 1)
    dealt = 2 * BF16 * sum(m * n for m, n in iter_matrices(costs)) / W * away(W)
    return {
        "fsdp": fsdp,
        "expert": 2 * passes * moving * tokens * away(P),
        "context": passes * context,
        "muon": dealt,
    }


def _seconds(
    costs: Costs, layout: Layout, device: Device, sent: dict[str, float], product_share: float, recompute: bool
) -> dict[str, float]:
    def rate(ranks: int) -> float:
        return LINK_SHARE * (device.link if ranks <= GPUS_PER_HOST else device.network)

    tokens = layout.local_tokens * layout.micro_batches
    passes = 4 if recompute else 3
    products = passes * costs.forward_flops(layout.tokens) * tokens / (product_share * device.flops)
    fsdp = sent["fsdp"] / rate(layout.gpus)
    newton_schulz = optimizer_flops(costs) / layout.gpus / (MUON_SHARE * device.flops)
    return {
        "products": products,
        "fsdp": max(0.0, fsdp - products),  # gathered ahead while layers compute
        "expert": sent["expert"] / rate(layout.expert),
        "context": sent["context"] / rate(layout.context),
        "optimizer": newton_schulz + sent["muon"] / rate(layout.gpus),
    }
