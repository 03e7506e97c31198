"""Ablations: trains every arm of every question with several seeds, and writes the tables and the curves.

    python -m benchmarks.ablations --data data --jobs 4                     one GPU, nano's shape, all questions
    python -m benchmarks.ablations --data data --scale cpu --questions residual    half an hour of one core
    python -m benchmarks.ablations --scale debug                            minutes, on made-up data

    data that all share ─► runs (arm x seed), side by side ─► held-out scores ─► tables, picture

A run that is done is kept (WORK/RUN/result.json), and one that was interrupted goes on, so the command can be given
again; the questions may be taken one by one. `--jobs N` trains N runs at a time on the same GPU or CPU, each in a
process of its own. The report goes to standard output; `--write docs/ablations.md` puts it between that page's markers,
and the picture beside it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.ablation_cases import QUESTIONS, SCALES, Arm, Scale, parameters
from benchmarks.ablation_data import prepare_pictures, prepare_texts
from benchmarks.ablation_report import draw, tables, write_between
from benchmarks.ablation_scores import score
from kimi_mm.data.manifest import write_aside
from kimi_mm.errors import UserError
from kimi_mm.evaluation.run_report import read_run
from kimi_mm.training.run import train

Runs = dict[str, tuple[Arm, int]]  # by key: arm and seed


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    scale = SCALES[options.scale]
    wanted = {name: QUESTIONS[name].arms(scale) for name in options.questions}
    runs = _runs(wanted, options.seeds)
    data = options.work / f"data-{options.scale}"
    try:
        made_up = options.scale == "debug"
        prepare_texts(data, options.data, scale, made_up=made_up)
        if any("vision" in arm.model for arm, _ in runs.values()):
            prepare_pictures(data, options.data, scale, made_up=made_up)
        if options.only:
            _run(*runs[options.only], options.work, data, scale)
            return 0
        failed = _run_all(options, runs, data, scale)
        results = {key: json.loads(path.read_text()) for key in runs if (path := _result(options.work, key)).exists()}
        report = _report(options, wanted, results)
        print(report, end="")
        if options.write:
            write_between(options.write, report)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    for key, reason in failed.items():
        print(f"{key} ({runs[key][0].name}, seed {runs[key][1]}): {reason}", file=sys.stderr)
    return 1 if failed else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.ablations", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="nano")
    parser.add_argument("--questions", default=",".join(QUESTIONS), help=f"of {', '.join(QUESTIONS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--data", type=Path, default=Path("data"), help="what `kimi-mm prepare` made")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--write", type=Path, help="page whose part between the markers is replaced")
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.questions = options.questions.split(",")
    if unknown := sorted(set(options.questions) - set(QUESTIONS)):
        parser.error(f"there is no question '{unknown[0]}'; there are {', '.join(QUESTIONS)}")
    if min(options.seeds, options.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    return options


def _runs(wanted: dict[str, list[Arm]], seeds: int) -> Runs:
    """All runs by key, seed by seed, so that a part of them compares every arm; those that others start from first."""
    runs: Runs = {}
    for seed in range(seeds):
        for arms in wanted.values():
            for arm in arms:
                for one in (arm.after, arm):
                    if one is not None:
                        runs.setdefault(one.key(seed), (one, seed))
    return runs


def _run_all(options: argparse.Namespace, runs: Runs, data: Path, scale: Scale) -> dict[str, str]:
    """Trains what is not done; returns the runs that failed and what they said."""
    waiting = [key for key in runs if not _result(options.work, key).exists()]
    failed: dict[str, str] = {}
    going: dict[str, subprocess.Popen] = {}
    try:
        while waiting or going:
            for key in [key for key in waiting if _base(runs[key]) in failed]:
                waiting.remove(key)
                failed[key] = "the run that it starts from failed"
            for key in [key for key in waiting if _ready(options.work, runs[key])][: options.jobs - len(going)]:
                waiting.remove(key)
                _note(f"{key}: {runs[key][0].name}, seed {runs[key][1]}")
                if options.jobs > 1:
                    going[key] = _start(options, key)
                    continue
                try:
                    _run(*runs[key], options.work, data, scale)
                except UserError as error:
                    failed[key] = str(error)
            for key, process in [(k, p) for k, p in going.items() if p.poll() is not None]:
                del going[key]
                if process.returncode:
                    failed[key] = f"ended with code {process.returncode}; see {options.work / key / 'log.txt'}"
            if going:
                time.sleep(0.2)
    finally:
        for process in going.values():
            process.terminate()  # a run saves on SIGTERM
        for process in going.values():
            process.wait()
    return failed


def _base(run: tuple[Arm, int]) -> str:
    arm, seed = run
    return "" if arm.after is None else arm.after.key(seed)


def _ready(work: Path, run: tuple[Arm, int]) -> bool:
    return not _base(run) or _result(work, _base(run)).exists()


def _start(options: argparse.Namespace, key: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.ablations", "--only", key, "--work", str(options.work)]
    command += ["--scale", options.scale, "--questions", ",".join(options.questions), "--seeds", str(options.seeds)]
    (options.work / key).mkdir(parents=True, exist_ok=True)
    with (options.work / key / "log.txt").open("ab") as log:
        return subprocess.Popen([*command, "--data", str(options.data)], stdout=log, stderr=log)


def _run(arm: Arm, seed: int, work: Path, data: Path, scale: Scale) -> None:
    """Trains one arm with one seed, phase by phase, scores it, and writes the result."""
    folder, started = work / arm.key(seed), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / "model.yaml", yaml.safe_dump(arm.model, sort_keys=False).encode())
    before = "" if arm.after is None else str(_last(work / arm.after.key(seed), arm.after))
    curve, at = [], 0
    for number, phase in enumerate(arm.phases):
        run = folder / f"phase-{number}"
        train(phase.recipe, output=run, overrides=_overrides(phase.overrides, seed, folder, data, before))
        summary = json.loads((run / "summary.json").read_text())
        if f"steps={summary['step']}" not in phase.overrides:
            _leave(f"{run}: stopped at step {summary['step']}, before its end; give the command again.")
        curves = read_run(run)
        curve += [(at + step, value) for step, value in curves.get("text", curves["loss"])]
        at, before = at + summary["step"], str(run / "model")
    result = {
        "arm": arm.name,
        "seed": seed,
        "scores": {measure: score(measure, Path(before), data, scale) for measure in arm.measures},
        "curve": curve,
        "seconds": round(time.monotonic() - started, 1),
        "device": _device(),
        "torch": torch.__version__,
    }
    write_aside(_result(work, arm.key(seed)), (json.dumps(result) + "\n").encode())


def _leave(reason: str) -> None:
    """Ends the process as SIGTERM would have, which the trainer took as a wish to save."""
    _note(reason)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _overrides(given: tuple[str, ...], seed: int, folder: Path, data: Path, before: str) -> list[str]:
    start = f"init={before}" if before else "init="
    shared = [f"seed={seed}", f"model={folder / 'model.yaml'}", f"tokenizer={data / 'tokenizer.json'}", start]
    return [*(override.replace("DATA", str(data.resolve())) for override in given), *shared]


def _last(folder: Path, arm: Arm) -> Path:
    return folder / f"phase-{len(arm.phases) - 1}" / "model"


def _report(options: argparse.Namespace, wanted: dict[str, list[Arm]], results: dict[str, dict[str, Any]]) -> str:
    parts, curves = [_heading(options, results)], {}
    for name, arms in wanted.items():
        found = [[r for s in range(options.seeds) if (r := results.get(arm.key(s))) is not None] for arm in arms]
        question = QUESTIONS[name]
        sizes = [parameters(arm.model) for arm in arms]
        parts.append(f"### {question.title}\n" + (f"\n{question.note}\n" if question.note else ""))
        parts.append(tables([arm.name for arm in arms], sizes, found))
        drawn = {arm.name: [r["curve"] for r in runs] for arm, runs in zip(arms, found, strict=True) if runs}
        curves |= {question.title: drawn} if drawn else {}
    if curves:
        picture = options.write.with_suffix(".png") if options.write else options.work / f"{options.scale}.png"
        draw(picture, curves)
        parts.append(f"![Training loss of every arm: mean and range over the seeds]({picture.name})\n")
    return "\n".join(parts)


def _heading(options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> str:
    scale = SCALES[options.scale]
    devices = ", ".join(sorted({r["device"] for r in results.values()})) or "nothing"
    minutes = sum(r["seconds"] for r in results.values()) / 60
    text = f"{scale.tokens / 1e6:.2f} M tokens: {scale.steps} steps of {scale.batch_rows} x {scale.row_tokens}"
    shape = f"{scale.layers} layers, {scale.precision}"
    return f"{len(results)} runs on {devices}, {minutes:.0f} minutes in all; {shape}. Runs on text take {text}.\n"


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} thread of a CPU ({platform.machine()})"


def _result(work: Path, key: str) -> Path:
    return work / key / "result.json"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(main())
