"""`kimi-mm eval`: scores on prepared test sets, and the tables that are made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kimi_mm.cli.errors import UsageError
from kimi_mm.cli.outputs import check_writable, write_file
from kimi_mm.cli.progress import progress_bar
from kimi_mm.errors import UserError

app = typer.Typer(help="Score a model on prepared test sets.", no_args_is_help=True)


@app.command()
def asr(
    set: Annotated[str, typer.Option("--set", help="human-test, human-adapt, sent, voice or all.")] = "all",
    data: Annotated[Path, typer.Option(metavar="DIR", help="What 'kimi-mm prepare' filled.")] = Path("data"),
    model: Annotated[str, typer.Option(help="A shipped model's name or a checkpoint folder.")] = "nano",
    label: Annotated[str | None, typer.Option(help="What tables call the model; default: its name.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    beams: Annotated[int, typer.Option(min=1, max=32, help="Readings followed side by side; 1 is greedy.")] = 4,
    result: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers here.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N utterances of each set.")] = None,
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst utterances to show.")] = 5,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Measure word error rate, real-time factor and peak memory of speech recognition."""
    from kimi_mm.evaluation.asr import SETS, collect, read_set, recognise, score

    if set != "all" and set not in SETS:
        raise UsageError(f"--set {set}: unknown; choose one of {', '.join(SETS)}, all.")
    if result is not None:
        check_writable(result)
    chosen = {name: read_set(data, name)[:limit] for name in (SETS if set == "all" else (set,))}

    import kimi_mm

    engine = kimi_mm.load(model, device=device)
    scores = []
    for name, utterances in chosen.items():
        with progress_bar(name, quiet) as progress:
            results = recognise(lambda wave: engine.transcribe(wave, beams=beams).text, utterances, progress)
        scores.append(score(name, results, worst=max(worst, 10)))
    evaluation = collect(label or engine.config.name, model, device, beams, scores)
    if result is not None:
        write_file(result, (json.dumps(evaluation, indent=1) + "\n").encode())
    show(evaluation, worst)


@app.command()
def vision(
    set: Annotated[
        str, typer.Option("--set", help="naming, style, count, color, relation, reading, digits or all.")
    ] = "all",
    data: Annotated[Path, typer.Option(metavar="DIR", help="What 'kimi-mm prepare scenes' filled.")] = Path("data"),
    model: Annotated[str, typer.Option(help="A shipped model's name or a checkpoint folder.")] = "nano",
    label: Annotated[str | None, typer.Option(help="What tables call the model; default: its name.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    result: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers here.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N pictures of each set.")] = None,
    worst: Annotated[int, typer.Option(min=0, help="How many wrong answers of each set to show.")] = 3,
    latency: Annotated[bool, typer.Option(help="Measure the time to the first word too.")] = True,
    programs: Annotated[bool, typer.Option("--programs", help="Answer by programs over the picture.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Measure answers about pictures: naming, counting, colours, relations, reading, digits, and the time they take."""
    from kimi_mm.data.scene_sets import SETS
    from kimi_mm.evaluation.vision import (
        Judge,
        answer_all,
        by_programs,
        collect,
        first_word_latency,
        read_sets,
        score,
    )

    if set != "all" and set not in SETS:
        raise UsageError(f"--set {set}: unknown; choose one of {', '.join(SETS)}, all.")
    if result is not None:
        check_writable(result)
    chosen = {name: examples[:limit] for name, examples in read_sets(data, set).items()}

    import kimi_mm

    engine = kimi_mm.load(model, device=device)
    if not programs:
        engine.look([])  # says at once that a model has no eyes
    first_word = first_word_latency(engine.describe_stream) if latency and not programs else None
    name_of_it = label or (f"{engine.config.name}, by programs" if programs else engine.config.name)

    def ask(path: Path, text: str) -> str:
        return by_programs(engine, path, text) if programs else engine.describe(path, text, max_tokens=48)

    scores = []
    for name, examples in chosen.items():
        with progress_bar(name, quiet) as progress:
            answers = answer_all(ask, examples, progress)
        scores.append(score(name, answers, Judge(), worst=max(worst, 10)))
    evaluation = collect(name_of_it, model, device, scores, first_word)
    if result is not None:
        write_file(result, (json.dumps(evaluation, indent=1) + "\n").encode())
    show_vision(evaluation, worst)


@app.command()
def speech(
    set: Annotated[
        str,
        typer.Option(
            "--set", help="teacher, resynthesis, conversion, reading, teacher-answers, answers (with commas), or all."
        ),
    ] = "all",
    data: Annotated[Path, typer.Option(metavar="DIR", help="What 'kimi-mm prepare' filled.")] = Path("data"),
    model: Annotated[str, typer.Option(help="A shipped model's name or a checkpoint folder.")] = "nano",
    label: Annotated[str | None, typer.Option(help="What tables call the model; default: its name.")] = None,
    device: Annotated[str, typer.Option(help="Of the model: cpu, cuda or cuda:N. Judges run on the CPU.")] = "cpu",
    result: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers here.")] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Only the first N sentences and dialogs.")] = None,
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst utterances to show.")] = 3,
    latency: Annotated[bool, typer.Option(help="Measure first sound, real-time factor and seams too.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Judge speech that a model makes: words, quality, voice, answers, and the time that it takes."""
    from kimi_mm.evaluation.answers import SpokenDialogs, answer_all
    from kimi_mm.evaluation.answers import score as score_answers
    from kimi_mm.evaluation.judges import Judges
    from kimi_mm.evaluation.speech import SETS, Voice, collect, make_all, maker, measure_stream, read_recordings, score

    chosen = SETS if set == "all" else tuple(set.split(","))
    for name in chosen:
        if name not in SETS:
            raise UsageError(f"--set {name}: unknown; choose some of {', '.join(SETS)}, or all.")
    if result is not None:
        check_writable(result)

    import kimi_mm

    engine = kimi_mm.load(model, device=device)
    _ = engine.detokenizer  # says at once that a model has no voice
    recordings = read_recordings(data)[:limit]
    talks = SpokenDialogs(data, limit) if {"answers", "teacher-answers"} & {*chosen} else None
    judges = Judges(data / "judges")
    voice = Voice(judges, recordings)
    stream = None
    if latency:
        with progress_bar("latency", quiet) as progress:
            stream = measure_stream(engine, recordings, progress)
    scores = []
    for name in chosen:
        if talks is not None and name in ("answers", "teacher-answers"):
            with progress_bar(name, quiet) as progress:
                reply = talks.teacher if name == "teacher-answers" else lambda dialog: talks.replies(engine, dialog)
                scores.append(score_answers(name, answer_all(talks.dialogs, reply, judges, progress)))
            continue
        with progress_bar(f"{name}: speaking", quiet) as progress:
            made = make_all(recordings, *maker(engine, name), progress)
        with progress_bar(f"{name}: judging", quiet) as progress:
            scores.append(score(name, made, judges, voice, progress))
    evaluation = collect(label or engine.config.name, model, device, scores, stream)
    if result is not None:
        write_file(result, (json.dumps(evaluation, indent=1) + "\n").encode())
    show_speech(evaluation, worst)


@app.command()
def card(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="From 'kimi-mm eval ... --json'.")],
    write: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Put the table between this file's markers.")
    ] = None,
) -> None:
    """Make the markdown table of a model card from evaluation results, all of one kind."""
    from kimi_mm.evaluation import report, speech_report, vision_report

    begin, end = report.BEGIN, report.END
    kinds = {module.KIND: module for module in (speech_report, vision_report)}
    if (module := kinds.get(report.read_result(results[0]).get("kind", ""))) is not None:
        begin, end = module.BEGIN, module.END
        table = module.markdown_table([module.check_result(report.read_result(path), str(path)) for path in results])
    else:
        table = report.markdown_table([report.load_result(path) for path in results])
    for path in write or []:
        try:
            document = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
        write_file(path, report.replace_between_markers(document, table, str(path), begin, end).encode())
    if not write:
        print(table, end="")


def show_vision(evaluation: dict[str, Any], worst: int) -> None:
    """Prints the scores as a table, then some wrong answers of each set."""
    from rich.console import Console

    from kimi_mm.evaluation.vision_report import conditions, terminal_table

    Console().print(terminal_table(evaluation))
    print(conditions(evaluation))
    for row in evaluation["sets"]:
        for item in row["worst"][:worst]:
            truth = ", ".join(item["truth"])
            print(f"{row['set']}/{item['picture']}: {item['question']} {item['said']!r}, not {truth!r}")


def show_speech(evaluation: dict[str, Any], worst: int) -> None:
    """Prints the scores as a table, then the worst utterances and some wrong answers."""
    from rich.console import Console

    from kimi_mm.evaluation.speech_report import conditions, terminal_table

    Console().print(terminal_table(evaluation))
    print(conditions(evaluation))
    for row in evaluation["sets"]:
        for item in row["worst"][:worst]:
            if "turns" in row:
                print(f"\n{row['set']}: {item['question']!r} {item['heard']!r}, not {item['expected']!r}")
            else:
                print(f"\n{row['set']} {item['key']}: {item['errors']} errors\n{item['alignment']}")


def show(evaluation: dict[str, Any], worst: int) -> None:
    """Prints the scores as a table, then the utterances with the most errors, aligned."""
    from rich.console import Console
    from rich.table import Table

    from kimi_mm.evaluation.report import percent, set_title

    table = Table("set", "utterances", "words", "WER % (95 %)", "S", "D", "I", "real-time factor")
    for row in evaluation["sets"]:
        table.add_row(
            set_title(row["set"]),
            str(row["utterances"]),
            str(row["words"]),
            f"{percent(row['wer'])} ({percent(row['wer_low'])} to {percent(row['wer_high'])})",
            str(row["substitutions"]),
            str(row["deletions"]),
            str(row["insertions"]),
            f"{row['real_time_factor']:.3f}",
        )
    console = Console()
    console.print(table)
    print(
        f"{evaluation['label']} on {evaluation['device']}, {evaluation['threads']} threads; "
        f"peak memory {evaluation['peak_rss_mib']:.0f} MiB; normaliser {evaluation['normalizer']}"
    )
    for row in evaluation["sets"]:
        for item in row["worst"][:worst]:
            print(f"\n{row['set']} {item['key']}: {item['errors']} errors\n{item['alignment']}")
