"""`kimi-mm plan`: what a model needs, by formulas: many GPUs to train it, or memory to run it."""

from __future__ import annotations

from typing import Annotated

import typer

from kimi_mm.cli.errors import UsageError


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A recipe, a model file such as 48b-a3b, or a folder.")],
    gpus: Annotated[
        str,
        typer.Option(metavar="N[,N]...", help="Plan training on so many GPUs; else memory to run it."),
    ] = "",
    device: Annotated[str, typer.Option(help="Kind of GPU: H100, H200, B200, A100, ...")] = "H100",
    tokens: Annotated[int, typer.Option(help="Tokens of a row.")] = 4096,
    step_tokens: Annotated[float, typer.Option(help="Tokens of an optimiser step over all GPUs, at least.")] = 4e6,
    expert: Annotated[int, typer.Option(help="GPUs that share experts; 0 chooses.")] = 0,
    context: Annotated[int, typer.Option(help="GPUs that share rows; 0 chooses.")] = 0,
    product_share: Annotated[
        float, typer.Option(help="Share of the peak that products reach; measure it on one GPU.")
    ] = 0.5,
    memory: Annotated[bool, typer.Option("--memory", help="Also show where the memory goes.")] = False,
) -> None:
    """Plan training on many GPUs, or the memory to run a model; formulas only, see docs/scaling.md."""
    from kimi_mm.training import plan_report
    from kimi_mm.training.costs import count
    from kimi_mm.training.devices import known_device
    from kimi_mm.training.plan import choose_layout

    counts = _numbers(gpus)
    kind = known_device(device)
    if kind is None:
        raise UsageError(f"--device {device} is not known.")
    if tokens < 1 or step_tokens < 1 or not 0 < product_share <= 1 or expert < 0 or context < 0:
        raise UsageError("--tokens and --step-tokens must be positive, --product-share in (0, 1].")
    config = plan_report.find_model(model).backbone
    print(plan_report.describe_size(count(config)))
    if not counts:
        print(plan_report.inference_table(config))
        return
    plans = [choose_layout(config, n, kind, tokens, step_tokens, expert, context, product_share) for n in counts]
    print(plan_report.training_table(plans))
    if memory:
        print(plan_report.memory_table(plans))


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise UsageError(f"--gpus {text}: expected numbers such as 8 or 8,64,1024.")
    return numbers
