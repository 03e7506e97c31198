"""Speed at published shapes with random weights, beside transformers in the same run.

    python -m benchmarks.published linear            decoding, Kimi-Linear's shape, 32k context, batch 16 (one 80 GB GPU
                                                     holds 8 of its 27 layers with --layers 8)
    python -m benchmarks.published audio             a spoken reply, Kimi-Audio's shape: first code, codes a second
    python -m benchmarks.published audio --weights int8 --device cpu --layers 8     peak memory on a CPU
    python -m benchmarks.published linear --debug    tiny, on any machine

Both sides get the same number of layers, the same prompt and the same number of steps. transformers runs Kimi-Linear
as it ships; Kimi-Audio it does not have, so that there is nothing beside it. Weights are random: speed does not
depend on them.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable

import torch

from kimi_mm.config import ModelConfig
from kimi_mm.conversion.presets import PRESETS
from kimi_mm.model import Model
from kimi_mm.quantized import QuantizedLinear, quantize


def shaped(kind: str, layers: int | None, debug: bool) -> ModelConfig:
    """The preset with fewer layers, or tiny."""
    config = PRESETS["kimi-linear-48b-a3b" if kind == "linear" else "kimi-audio-7b"].config.replace(detokenizer=None)
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
    # Codes and features come from elsewhere; the tokenizers are not measured here.
    return config.replace(backbone=backbone, hears=False)


def drawn(config: ModelConfig, device: str, dtype: torch.dtype, weights: str | None) -> Model:
    """Random weights, drawn one tensor at a time, so that nothing is held whole before it is quantized."""
    with torch.device("meta"):
        model = Model(config)
    for name, module in list(model.named_modules()):
        linear = isinstance(module, torch.nn.Linear)
        for key, parameter in module.named_parameters(recurse=False):
            value = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(std=0.02)
            if linear and key == "weight" and weights and parameter.shape[1] % 32 == 0:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, QuantizedLinear(*quantize(value, weights)))
            else:
                owner = model.get_submodule(name) if name else model
                if key == "bias" and isinstance(owner, QuantizedLinear):
                    owner.bias = torch.nn.Parameter(value, requires_grad=False)
                else:
                    owner._parameters[key] = torch.nn.Parameter(value, requires_grad=False)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.zeros(buffer.shape, device=device) if buffer.is_meta else buffer.to(device)
    return model.eval()


def clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def steps(run: Callable[[], None], count: int, device: str) -> dict[str, float]:
    """Times single steps: p50, p90 and p99 in milliseconds."""
    for _ in range(min(3, count)):
        run()
    times = []
    for _ in range(count):
        start = clock(device)
        run()
        times.append(1000 * (clock(device) - start))
    ordered = sorted(times)
    return {f"p{q}_ms": round(ordered[min(len(ordered) - 1, q * len(ordered) // 100)], 3) for q in (50, 90, 99)}


@torch.inference_mode()
def decode_linear(model: Model, batch: int, context: int, count: int, device: str) -> dict[str, float]:
    """Our decoding steps after a prompt of `context` tokens, read in pieces of 4096."""
    backbone = model.backbone
    cache = backbone.new_cache(batch)
    ids = torch.randint(0, 512, (batch, context), device=device)
    start = clock(device)
    for piece in ids.split(4096, 1):
        hidden = backbone(backbone.embed(piece), cache=cache).text_hidden[:, -1:]
    prefill = clock(device) - start
    token = backbone.text_logits(hidden).argmax(-1)

    def step() -> None:
        nonlocal token
        token = backbone.text_logits(backbone(backbone.embed(token), cache=cache).text_hidden).argmax(-1)

    measured = steps(step, count, device)
    return {"prefill_s": round(prefill, 3), **measured, "tokens_per_s": round(1000 * batch / measured["p50_ms"], 1)}


@torch.inference_mode()
def decode_transformers(config: ModelConfig, batch: int, context: int, count: int, device: str, dtype: torch.dtype):
    """transformers' Kimi-Linear of the same shape."""
    import transformers

    b = config.backbone
    assert b.kda
    assert b.mla
    assert b.moe
    theirs = transformers.KimiLinearConfig(
        vocab_size=b.vocab_size,
        hidden_size=b.hidden_size,
        intermediate_size=b.intermediate_size,
        num_hidden_layers=len(b.trunk),
        num_attention_heads=b.mla.num_heads,
        num_key_value_heads=b.mla.num_heads,
        q_lora_rank=None,
        kv_lora_rank=b.mla.kv_lora_rank,
        qk_nope_head_dim=b.mla.qk_nope_head_dim,
        qk_rope_head_dim=b.mla.qk_rope_head_dim,
        v_head_dim=b.mla.v_head_dim,
        moe_intermediate_size=b.moe.intermediate_size,
        num_local_experts=b.moe.num_experts,
        num_experts_per_tok=b.moe.num_experts_per_token,
        linear_head_dim=b.kda.head_dim,
        linear_num_heads=b.kda.num_heads,
        layer_types=["linear_attention" if kind.startswith("kda") else "full_attention" for kind in b.trunk],
        mlp_layer_types=["sparse" if kind.endswith("moe") else "dense" for kind in b.trunk],
        pad_token_id=0,
    )
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = transformers.KimiLinearForCausalLM(theirs).eval()
        finally:
            torch.set_default_dtype(before)
    ids = torch.randint(0, 512, (batch, context), device=device)
    start, cache = clock(device), None
    for piece in ids.split(4096, 1):
        output = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
    prefill = clock(device) - start
    token = output.logits[:, -1:].argmax(-1)

    def step() -> None:
        nonlocal token
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    measured = steps(step, count, device)
    return {"prefill_s": round(prefill, 3), **measured, "tokens_per_s": round(1000 * batch / measured["p50_ms"], 1)}


@torch.inference_mode()
def reply(model: Model, prompt: int, count: int, device: str) -> dict[str, float]:
    """A spoken reply: time to the first code (prompt, and as many steps as speech trails text), then codes a second."""
    backbone, delay = model.backbone, model.config.audio_delay
    cache = backbone.new_cache(1)
    ids = torch.randint(0, 512, (2, 1, prompt), device=device)
    output, done = None, 0

    def step(text: torch.Tensor, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = backbone(backbone.embed(text, audio), cache=cache)
        assert out.audio_hidden is not None
        return (
            backbone.text_logits(out.text_hidden[:, -1:]).argmax(-1),
            backbone.audio_logits(out.audio_hidden[:, -1:]).argmax(-1),
        )

    start = clock(device)
    output = step(ids[0], ids[1])
    while done < delay:
        output, done = step(*output), done + 1
    first = clock(device) - start

    def run() -> None:
        nonlocal output
        output = step(*output)

    measured = steps(run, count, device)
    return {"first_code_s": round(first, 3), **measured, "codes_per_s": round(1000 / measured["p50_ms"], 1)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("linear", "audio"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than published")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--weights", choices=("int8", "int4"), default=None, help="dense matrices in few bits")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--debug", action="store_true", help="tiny sizes")
    options = parser.parse_args(arguments)
    config = shaped(options.kind, options.layers, options.debug)
    dtype = torch.float32 if options.debug else torch.bfloat16
    batch, context = (2, 64) if options.debug else (options.batch, options.context)
    count = 4 if options.debug else options.steps
    facts = {"kind": options.kind, "device": options.device, "layers": len(config.backbone.trunk), "batch": batch}
    model = drawn(config, options.device, dtype, options.weights)
    if options.kind == "linear":
        ours = decode_linear(model, batch, context, count, options.device)
    else:
        ours = reply(model, 64 if options.debug else 256, count, options.device)
    print(
        json.dumps(
            {**facts, "who": "kimi_mm", "weights": options.weights or str(dtype), **ours, **memory(options.device)}
        )
    )
    if options.kind == "linear" and not options.alone:
        del model
        theirs = decode_transformers(config, batch, context, count, options.device, dtype)
        ratio = round(ours["tokens_per_s"] / theirs["tokens_per_s"], 2)
        print(json.dumps({**facts, "who": "transformers", **theirs, "ours_over_theirs": ratio}))


def memory(device: str) -> dict[str, float]:
    """Peak memory so far, GiB."""
    if device.startswith("cuda"):
        return {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
    return {"peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}


if __name__ == "__main__":
    main()
