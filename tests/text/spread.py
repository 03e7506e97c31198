"""What a rank does in the tests of context and expert parallelism: its share of a layer or backbone, in float64."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kimi_mm.config import BackboneConfig, GQAConfig, KDAConfig, MLAConfig, MoEConfig, RopeConfig
from kimi_mm.text.backbone import Backbone
from kimi_mm.text.context import Context
from kimi_mm.text.expert_parallel import ExpertPlace
from kimi_mm.text.moe import MoE
from kimi_mm.training import qk_clip

CONFIG = BackboneConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    trunk=("kda/dense", "mla/dense", "gqa/dense", "kda/dense"),
    kda=KDAConfig(num_heads=1, num_value_heads=2, head_dim=8, value_head_dim=12),
    mla=MLAConfig(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, rope=RopeConfig()),
    gqa=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=8),
)


def backbone() -> Backbone:
    torch.manual_seed(0)
    model = Backbone(CONFIG).double().train()
    qk_clip.track(model)
    return model


def run(model: Backbone, ids: torch.Tensor, weights: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple:
    """Hidden states, gradients of their weighted sum, and the largest logits of every head."""
    hidden = model(model.embed(ids), cu_seqlens=cu_seqlens).text_hidden
    (hidden * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), gradients, [layer.qk_max.peak for layer in qk_clip.attention_layers(model)]


def stretch(ids: torch.Tensor, weights: torch.Tensor, cu_seqlens: torch.Tensor | None, recompute: bool) -> tuple:
    """This rank's part of `run`, with gradients summed over the ranks."""
    dist.init_process_group("gloo")
    model = backbone()
    model.context = Context(dist.group.WORLD)
    for layer in model.decoder_layers():
        layer.recompute = recompute
    hidden, gradients, peaks = run(model, model.context.cut(ids), model.context.cut(weights), cu_seqlens)
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    for peak in peaks:
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    return hidden.numpy(), {name: g.numpy() for name, g in gradients.items()}, [p.numpy() for p in peaks]


MOE = MoEConfig(num_experts=8, num_experts_per_token=2, intermediate_size=8, num_shared_experts=1)


def moe() -> MoE:
    torch.manual_seed(1)
    layer = MoE(MOE, 16).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return layer


def experts(x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor) -> tuple:
    """Outputs for this rank's rows, of x [ranks, N, D]; gradients of the mean over ranks, experts' own ones apart."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    layer = moe()
    layer.router.bias.copy_(bias)
    for name, weight in layer.experts.named_parameters():
        setattr(layer.experts, name, torch.nn.Parameter(weight.detach().chunk(size)[rank].clone()))
    mesh = init_device_mesh("cpu", (1, size))
    layer.experts.place = ExpertPlace(mesh, mesh)
    mine = x[rank].clone().requires_grad_()
    out = layer(mine[None])[0]
    (out * weights[rank]).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        if not name.startswith("experts."):
            dist.all_reduce(gradient)
            gradient /= size
    return out.detach().numpy(), mine.grad.numpy(), {name: g.numpy() for name, g in gradients.items()}
