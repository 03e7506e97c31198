"""Training throughput on one device: our backbone, and the same shape in transformers' `kimi_linear`, in one run.

    python -m benchmarks.training                 one GPU, 1.4 B parameters, rows of 4096 tokens, bf16
    python -m benchmarks.training --micro-batches 16    a step of 262,144 tokens, nearer to those of real runs
    python -m benchmarks.training --debug         tiny, on a CPU

| contestant | model | optimiser |
|---|---|---|
| muonclip | as the model file says (Block AttnRes, bounded gate) | MuonClip with QK-clip |
| adamw | the same | AdamW, fused on a GPU |
| plain | plain residual stream | AdamW |
| same-shape | plain residual, softplus gate: what `kimi_linear` is | AdamW |
| theirs | transformers' KimiLinearForCausalLM, with fla's kernels where fla is installed | AdamW |

An optimiser takes as long whatever the tokens of a step, so its share depends on `--micro-batches`.

All run the same loop on the same random tokens with fp32 weights under bf16 autocast; `theirs` and `same-shape` start
from the same weights, so that their first losses show that they compute the same. Times are medians; MFU counts the
active parameters (`kimi_mm.training.costs`) against the device's peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kimi_mm import kernels
from kimi_mm.config import BackboneConfig, ModelConfig
from kimi_mm.data.loader import TextBatch
from kimi_mm.text.backbone import Backbone
from kimi_mm.training import qk_clip
from kimi_mm.training.costs import count
from kimi_mm.training.devices import known_device
from kimi_mm.training.recipe import OptimConfig, recipes_root
from kimi_mm.training.trainer import make_optimizer

CONTESTANTS = ("muonclip", "adamw", "plain", "same-shape", "theirs")


class TextTask(nn.Module):
    """Next-token loss of a backbone on a batch of text."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: TextBatch) -> dict[str, Tensor]:
        hidden = self.backbone(self.backbone.embed(batch.text_ids)).text_hidden.flatten(0, 1)
        head = self.backbone.embed_tokens if self.backbone.lm_head is None else self.backbone.lm_head
        return {"loss": kernels.linear_cross_entropy(hidden, head.weight, batch.labels.flatten())}


def random_batch(vocab_size: int, rows: int, tokens: int, seed: int, device: torch.device) -> TextBatch:
    """Tokens that are the same on every device, and the next one of each as its label."""
    ids = torch.randint(0, vocab_size, (rows, tokens + 1), generator=torch.Generator().manual_seed(seed)).to(device)
    return TextBatch(ids[:, :-1].contiguous(), ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def theirs_of(config: BackboneConfig) -> Any:
    """transformers' model of the shape of a KDA and MLA backbone."""
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    kda, mla, moe = config.kda, config.mla, config.moe
    assert kda is not None
    assert mla is not None
    assert moe is not None
    kinds = [kind.split("/") for kind in (*config.trunk, *config.text_branch)]
    values = KimiLinearConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=moe.intermediate_size,
        num_hidden_layers=len(kinds),
        num_attention_heads=mla.num_heads,
        num_key_value_heads=mla.num_heads,
        n_shared_experts=moe.num_shared_experts,
        routed_scaling_factor=moe.routed_scaling_factor,
        kv_lora_rank=mla.kv_lora_rank,
        q_lora_rank=mla.q_lora_rank,
        qk_rope_head_dim=mla.qk_rope_head_dim,
        qk_nope_head_dim=mla.qk_nope_head_dim,
        v_head_dim=mla.v_head_dim,
        num_experts_per_tok=moe.num_experts_per_token,
        num_local_experts=moe.num_experts,
        rms_norm_eps=config.rms_norm_eps,
        linear_head_dim=kda.head_dim,
        linear_num_heads=kda.num_heads,
        layer_types=["linear_attention" if mixer == "kda" else "full_attention" for mixer, _ in kinds],
        mlp_layer_types=["sparse" if mlp == "moe" else "dense" for _, mlp in kinds],
        pad_token_id=None,
        use_cache=False,
    )
    return KimiLinearForCausalLM(values)


class _Theirs(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TextBatch) -> dict[str, Tensor]:
        logits = self.model(batch.text_ids).logits.flatten(0, 1)
        return {"loss": nn.functional.cross_entropy(logits.float(), batch.labels.flatten())}


def build(contestant: str, config: BackboneConfig, device: torch.device) -> tuple[nn.Module, OptimConfig]:
    """Makes a contestant's task on the device, and the optimiser's settings."""
    from kimi_mm.text.key_maps import backbone_config, from_transformers

    torch.manual_seed(0)
    optim = OptimConfig(optimizer="muonclip" if contestant == "muonclip" else "adamw", lr=1e-4)
    if contestant in ("theirs", "same-shape"):
        theirs = theirs_of(config).float()
        if contestant == "theirs":
            return _Theirs(theirs.to(device)), optim
        same = backbone_config("kimi_linear", theirs.config.to_dict())
        backbone = Backbone(same)
        backbone.load_state_dict(from_transformers(theirs.state_dict(), same))
    else:
        backbone = Backbone(config.replace(residual="plain") if contestant == "plain" else config)
    return TextTask(backbone.to(device)), optim


def measure(
    task: nn.Module,
    optim: OptimConfig,
    batches: list[TextBatch],
    device: torch.device,
    bf16: bool,
    micro_batches: int = 1,
) -> dict:
    """Trains over the batches, of which the first two steps warm up.

    Args:
        task: maps a batch to {"loss": ...}.
        optim: optimiser and rate.
        batches: three steps' or more.
        device: that they are on.
        bf16: autocast.
        micro_batches: batches of a step.

    Returns:
        Seconds of a step's forward and backward passes and of its optimiser (medians, without two warm-up steps), peak
        bytes on a GPU, and the loss of the first batch.
    """
    task.train()
    optimizer = make_optimizer(task, optim, fused=device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = _Clock(device)
    products, updates, first = [], [], None
    for start in range(0, len(batches), micro_batches):
        with clock.into(products):
            for batch in batches[start : start + micro_batches]:
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = task(batch)["loss"]
                (loss / micro_batches).backward()
                first = loss.detach() if first is None else first
        with clock.into(updates):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if isinstance(task, TextTask):
                task.backbone.update_expert_bias()
            if optim.optimizer == "muonclip":
                qk_clip.apply(task, optim.qk_clip)
    assert first is not None
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {
        "products": statistics.median(products[2:]),
        "optimizer": statistics.median(updates[2:]),
        "peak_bytes": peak,
        "first_loss": float(first),
    }


class _Clock:
    """Appends seconds of a stretch of work to a list, waiting for the device at its end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def into(self, seconds: list[float]) -> _Clock:
        self.seconds = seconds
        return self

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.start)


def device_peak(device: torch.device, given: float) -> float:
    """FLOP/s of the device: as given in TFLOP/s, or known by its name, else 0."""
    if given or device.type != "cuda":
        return given * 1e12
    known = known_device(torch.cuda.get_device_name(device))
    return 0.0 if known is None else known.flops


def main(arguments: list[str] | None = None, note: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--model", default="1b4-a0.4b", help="file below recipes/models")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--recompute", action="store_true", help="recompute activations (ours and theirs)")
    parser.add_argument("--peak-tflops", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.debug:
        options.rows, options.tokens, options.steps = 1, 48, 4
    device = torch.device("cuda" if torch.cuda.is_available() and not options.debug else "cpu")
    name = "debug" if options.debug else options.model
    config = ModelConfig.from_yaml(recipes_root() / "models" / f"{name}.yaml").backbone
    config = config.replace(adaptor_input_size=None, tie_word_embeddings=False)  # `kimi_linear` has a head of its own
    if config.mla is not None:
        config = config.replace(mla=config.mla.replace(rope=None))  # as `kimi_linear` has it
    batches = [
        random_batch(config.vocab_size, options.rows, options.tokens, seed, device)
        for seed in range(options.steps * options.micro_batches)
    ]
    costs, tokens = count(config), options.rows * options.tokens * options.micro_batches
    peak = device_peak(device, options.peak_tflops)
    label = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    note(
        f"torch {torch.__version__}, {label}; {name}, {costs.total / 1e9:.3f} G parameters, {costs.active / 1e9:.3f} G"
    )
    note(f"active; {options.rows} rows of {options.tokens} tokens, {options.micro_batches} times a step,")
    note(f"median of {options.steps - 2} steps")
    note(f"{'contestant':<12}{'tokens/s':>11}{'MFU':>8}{'fwd+bwd ms':>12}{'optim. ms':>11}{'GiB':>7}{'first loss':>12}")
    results: dict[str, dict] = {}
    for contestant in options.contestants:
        try:
            task, optim = build(contestant, config, device)
            if options.recompute:
                _recompute(task)
            row = measure(task, optim, batches, device, not options.debug, options.micro_batches)
        except (RuntimeError, ImportError) as error:
            results[contestant] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            note(f"{contestant:<12}{results[contestant]['error']}")
            continue
        finally:
            task = None
            if device.type == "cuda":
                torch.cuda.empty_cache()
        row["tokens_per_second"] = tokens / (row["products"] + row["optimizer"])
        row["mfu"] = row["tokens_per_second"] * costs.training_flops(options.tokens) / peak if peak else None
        results[contestant] = row
        share = "-" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"
        note(
            f"{contestant:<12}{row['tokens_per_second']:>11,.0f}{share:>8}{1e3 * row['products']:>12.1f}"
            f"{1e3 * row['optimizer']:>11.1f}{row['peak_bytes'] / 2**30:>7.1f}{row['first_loss']:>12.4f}"
        )
    for line in _comparisons(results):
        note(line)
    if options.json:
        options.json.write_text(json.dumps({"device": label, "results": results}, indent=1) + "\n", encoding="utf-8")


def _recompute(task: nn.Module) -> None:
    if isinstance(task, TextTask):
        for layer in task.backbone.decoder_layers():
            layer.recompute = True
    elif isinstance(task, _Theirs):
        task.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _comparisons(results: dict[str, dict]) -> list[str]:
    good = {name: row for name, row in results.items() if "error" not in row}
    step = {name: row["products"] + row["optimizer"] for name, row in good.items()}
    lines = []
    if {"adamw", "plain"} <= good.keys():
        more = (good["adamw"]["products"] - good["plain"]["products"]) / step["plain"]
        lines.append(f"Block AttnRes costs {100 * more:.1f} % of a step with a plain residual stream")
    for name in ("muonclip", "adamw"):
        if name in good:
            lines.append(f"optimiser {name}: {100 * good[name]['optimizer'] / step[name]:.1f} % of a step")
    for name in ("same-shape", "adamw", "muonclip"):
        if {name, "theirs"} <= good.keys():
            lines.append(f"{name} against theirs: {step['theirs'] / step[name]:.2f} times the tokens/s")
    return lines


if __name__ == "__main__":
    main()
