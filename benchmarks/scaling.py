"""Training on 1, 2, 4, 8 GPUs of one host: FSDP2 alone, with expert parallelism, with context parallelism.

    python -m benchmarks.scaling --gpus 1,2,4,8 --modes ddp fsdp expert context
    python -m benchmarks.scaling --gpus 1,4 --modes context --tokens 131072 --rows 1
    python -m benchmarks.scaling --debug          2 processes on a CPU, over gloo

Every line is a run of its own, started by torchrun: the same rows for every GPU (for context: for all GPUs of a
group), so that the efficiency is that of weak scaling, or for context the speed-up of one batch by GPUs. `sent` is the
share of a step's time in communication kernels, from a profile of one step; on GPUs it overlaps with products.
`difference` is the largest relative difference of a loss from that of one process over `--equal-steps` steps of the
same global batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.training import TextTask, device_peak, random_batch
from kimi_mm.config import ModelConfig
from kimi_mm.text.backbone import Backbone
from kimi_mm.training import qk_clip
from kimi_mm.training.costs import count
from kimi_mm.training.parallel import Parallel, join_processes, leave_processes, own_device
from kimi_mm.training.parallel_config import ParallelConfig
from kimi_mm.training.recipe import OptimConfig, Recipe, recipes_root
from kimi_mm.training.trainer import make_optimizer

MODES = ("ddp", "fsdp", "expert", "context")


def parallel_of(mode: str, world: int, recompute: bool) -> ParallelConfig:
    """How a mode spreads a run over so many processes."""
    return ParallelConfig(
        data="ddp" if mode == "ddp" or world == 1 else "fsdp",
        expert=world if mode == "expert" else 1,
        context=world if mode == "context" else 1,
        checkpoint_activations=recompute,
    )


class Run:
    """One process's part of a run on random batches."""

    def __init__(self, options: argparse.Namespace, micro_batches: int) -> None:
        self.options, self.device = options, own_device()
        config = ModelConfig.from_yaml(recipes_root() / "models" / f"{options.model}.yaml").backbone
        self.config = config.replace(adaptor_input_size=None)
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        recipe = Recipe(
            stage="text",
            model=options.model,
            precision="fp32" if self.device.type == "cpu" else "bf16",
            gradient_accumulation=micro_batches,
            parallel=parallel_of(options.mode, world, options.recompute),
            optim=OptimConfig(optimizer=options.optimizer, lr=1e-4),
        )
        torch.manual_seed(0)
        self.task = TextTask(Backbone(self.config)).train()
        self.parallel = Parallel(recipe, self.task, self.device)
        self.recipe = recipe
        self.optimizer = make_optimizer(self.task, recipe.optim, fused=self.device.type == "cuda")

    def step(self, number: int) -> float:
        """One optimiser step on the batches of its number; returns the loss over all processes."""
        parallel, options, losses = self.parallel, self.options, []
        for micro in range(parallel.micro_batches):
            seed = number * self.recipe.gradient_accumulation + micro * parallel.groups + parallel.group
            batch = random_batch(self.config.vocab_size, options.rows, options.tokens, seed, self.device)
            with parallel.accumulating(last=micro == parallel.micro_batches - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
                    loss = parallel.step(batch, False)["loss"]
                (loss / parallel.micro_batches).backward()
            losses.append(loss.detach())
        parallel.finish_gradients()
        parallel.clip(self.task.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        parallel.sum_loads()
        self.task.backbone.update_expert_bias()
        if self.recipe.optim.optimizer == "muonclip":
            qk_clip.apply(self.task)
        return float(parallel.mean(torch.stack(losses).mean()))


def work(options: argparse.Namespace) -> None:
    """What a launched process does: losses on equal global batches, then speed; rank 0 writes a JSON file."""
    join_processes()
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    run = Run(options, options.global_batches)
    losses = [run.step(number) for number in range(options.equal_steps)]
    del run
    run = Run(options, world // parallel_of(options.mode, world, False).context)
    cuda = run.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for number in range(options.steps + 2):
        start = time.perf_counter()
        run.step(number)  # its loss is read back, so the device is done
        taken.append(time.perf_counter() - start)
    if run.parallel.main:
        seconds = statistics.median(taken[2:])
        tokens = run.parallel.groups * options.rows * options.tokens / world / seconds
        peak = device_peak(run.device, options.peak_tflops)
        found: dict[str, Any] = {
            "losses": losses,
            "tokens_per_second": tokens,
            "mfu": tokens * count(run.config).training_flops(options.tokens) / peak if peak else None,
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        }
    sent = _share_of_communication(run, options.steps + 2)
    if run.parallel.main:
        options.out.write_text(json.dumps({**found, "sent": sent}), encoding="utf-8")
    del run
    leave_processes()


def _share_of_communication(run: Run, number: int) -> float:
    """Time in NCCL kernels (on a CPU: in collectives) over the time of a step."""
    from torch.profiler import ProfilerActivity, profile

    cuda = run.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds) as profiled:
        start = time.perf_counter()
        run.step(number)
        seconds = time.perf_counter() - start
    total = 0.0
    for event in profiled.key_averages():
        if cuda and "nccl" in event.key.lower():
            total += event.self_device_time_total
        elif not cuda and event.key.startswith("gloo:"):
            total += event.cpu_time_total
    return total / 1e6 / seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="a tiny model, 1 and 2 processes on a CPU")
    parser.add_argument("--gpus", default="1,2,4,8")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["fsdp", "expert", "context"])
    parser.add_argument("--model", default="1b4-a0.4b", help="file below recipes/models")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--equal-steps", type=int, default=50)
    parser.add_argument("--optimizer", choices=("adamw", "muonclip"), default="muonclip")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--peak-tflops", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)  # of a launched process
    parser.add_argument("--global-batches", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.mode:
        work(options)
        return
    if options.debug:
        options.gpus, options.model, options.rows, options.tokens = "1,2", "debug", 1, 16
        options.steps, options.equal_steps = 2, 2
    counts = sorted({int(part) for part in options.gpus.split(",")} | {1})
    rows: list[dict[str, Any]] = []
    titles = ("mode", "GPUs", "tokens/s a GPU", "MFU", "GiB", "efficiency", "sent", "difference")
    widths = (9, 5, 16, 8, 7, 12, 8, 12)
    print("".join(title.rjust(width) for title, width in zip(titles, widths, strict=True)))
    single: dict[str, Any] | None = None  # one process is the same in every mode
    for mode in options.modes:
        alone: dict[str, Any] | None = None
        for gpus in counts:
            found = dict(single) if single and gpus == 1 else _launch(options, mode, gpus, max(counts))
            if "error" in found:
                print(f"{mode:<9}{gpus:>5}  {found['error']}")
                rows.append({"mode": mode, "gpus": gpus, **found})
                continue
            single = found if gpus == 1 else single
            alone = alone or found
            found["efficiency"] = found["tokens_per_second"] / alone["tokens_per_second"]
            pairs = zip(found["losses"], alone["losses"], strict=True)
            found["difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
            mfu = f"{100 * found['mfu']:.1f} %" if found["mfu"] else "-"
            print(
                f"{mode:<9}{gpus:>5}{found['tokens_per_second']:>16,.0f}{mfu:>8}{found['peak_bytes'] / 2**30:>7.1f}"
                f"{100 * found['efficiency']:>10.0f} %{100 * found['sent']:>6.0f} %{found['difference']:>12.1e}",
                flush=True,
            )
            rows.append({"mode": mode, "gpus": gpus, **found})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _launch(options: argparse.Namespace, mode: str, gpus: int, batches: int) -> dict[str, Any]:
    """Runs one line of the table in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
        command += ["-m", "benchmarks.scaling", "--mode", mode, "--out", str(out), "--global-batches", str(batches)]
        for name in ("model", "rows", "tokens", "steps", "equal_steps", "optimizer", "peak_tflops"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        command += ["--recompute"] if options.recompute else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not out.is_file():
            errors = [line for line in done.stderr.splitlines() if "Error" in line]
            return {"error": errors[0].strip() if errors else f"ended with code {done.returncode}"}
        return json.loads(out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
