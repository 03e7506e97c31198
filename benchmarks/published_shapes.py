"""Models of published shapes with random weights, and what is measured of them."""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from kimi_mm.audio.detokenizer_config import BigVGANConfig
from kimi_mm.config import ModelConfig
from kimi_mm.conversion.presets import PRESETS
from kimi_mm.model import Model
from kimi_mm.quantized import QuantizedLinear, quantize

BLOCK = 2**24  # random numbers that larger tensors repeat: speed does not depend on them
Row = dict[str, object]


def shaped(kind: str, layers: int | None, debug: bool, voice: bool = False) -> ModelConfig:
    """The preset "linear" or "audio" with fewer layers, or tiny; codes and features come from elsewhere."""
    config = PRESETS["kimi-linear-48b-a3b" if kind == "linear" else "kimi-audio-7b"].config
    backbone = config.backbone
    if kind == "linear":
        backbone = backbone.replace(trunk=backbone.trunk[: layers or (4 if debug else None)])
    else:
        count = layers or (4 if debug else 28)
        branch = min(6, max(1, count // 4))
        backbone = backbone.replace(
            trunk=("gqa/dense",) * (count - branch),
            text_branch=("gqa/dense",) * branch,
            audio_branch=("gqa/dense",) * branch,
        )
    if debug:
        backbone = backbone.replace(hidden_size=64, intermediate_size=96)
        if backbone.kda and backbone.mla and backbone.moe:
            backbone = backbone.replace(
                kda=backbone.kda.replace(num_heads=2, head_dim=32),
                mla=backbone.mla.replace(
                    num_heads=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
                ),
                moe=backbone.moe.replace(num_experts=8, num_experts_per_token=2, intermediate_size=32),
            )
        if backbone.gqa:
            backbone = backbone.replace(gqa=backbone.gqa.replace(num_heads=4, num_kv_heads=2, head_dim=16))
    detokenizer = config.detokenizer if voice else None
    if detokenizer is not None and debug:
        dit = detokenizer.dit.replace(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
        vocoder = BigVGANConfig(initial_channels=128, resblock_kernels=(3,), resblock_dilations=(1,))
        detokenizer = detokenizer.replace(dit=dit, bigvgan=vocoder)
    return config.replace(backbone=backbone, detokenizer=detokenizer, hears=False)


def drawn(config: ModelConfig, device: str, dtype: torch.dtype, weights: str | None = None) -> Model:
    """Random weights, drawn one tensor at a time, so that nothing is held whole before it is quantized."""
    with torch.device("meta"):
        model = Model(config)
    block = torch.empty(BLOCK, dtype=dtype, device=device).normal_(std=0.02)
    for name, module in list(model.named_modules()):
        linear = isinstance(module, nn.Linear) and name.startswith("backbone.")
        for key, parameter in module.named_parameters(recurse=False):
            value = _drawn(parameter.shape, block)
            if key == "weight" and "norm" in name:
                value += 1
            if linear and key == "weight" and weights and parameter.shape[1] % 32 == 0:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, QuantizedLinear(*quantize(value, weights)))
                continue
            setattr(model.get_submodule(name) if name else model, key, nn.Parameter(value, requires_grad=False))
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                empty = torch.zeros(buffer.shape, device=device) if buffer.is_meta else buffer.to(device)
                module._buffers[key] = empty
    return model.eval()


def _drawn(shape: torch.Size, block: Tensor) -> Tensor:
    count = shape.numel()
    if count <= len(block):
        return block[:count].clone().view(shape)
    value = block.new_empty(count)
    for at in range(0, count, len(block)):
        value[at : at + len(block)] = block[: count - at]
    return value.view(shape)


def clock(device: str) -> float:
    """Seconds, when the device has done all."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(run: Callable[[], None], count: int, device: str, warm: int = 3) -> Row:
    """Times single calls: p50, p90 and p99 in milliseconds."""
    for _ in range(min(warm, count)):
        run()
    times = []
    for _ in range(count):
        start = clock(device)
        run()
        times.append(1000 * (clock(device) - start))
    return quantiles(times)


def quantiles(times: list[float]) -> Row:
    """p50, p90 and p99 of milliseconds."""
    ordered = sorted(times)
    return {f"p{q}_ms": round(ordered[min(len(ordered) - 1, q * len(ordered) // 100)], 3) for q in (50, 90, 99)}


def peak(device: str) -> float:
    """Peak memory so far, GiB: of the device, or of this process."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def free(device: str) -> None:
    """Gives memory of what was deleted back, and forgets the peak."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def where(device: str) -> str:
    """The machine, for people."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def save(path: Path, rows: list[Row], device: str, arguments: list[str]) -> None:
    """Writes what was measured as JSON, aside first."""
    facts = {"machine": where(device), "torch": torch.__version__, "arguments": arguments, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)
