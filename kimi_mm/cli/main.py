"""The command `kimi-mm`. Starting it stays light: a command imports torch and the model when it runs."""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Any

import typer

from kimi_mm import __version__
from kimi_mm.cli.chain import chain
from kimi_mm.cli.chat import TurnsInOrder, chat
from kimi_mm.cli.check_data import check_data
from kimi_mm.cli.convert import convert
from kimi_mm.cli.demo import demo
from kimi_mm.cli.describe import describe as describe_pictures
from kimi_mm.cli.errors import UsageError, complain, debugging, describe
from kimi_mm.cli.evaluate import app as eval_app
from kimi_mm.cli.info import info
from kimi_mm.cli.plan import plan
from kimi_mm.cli.prepare import prepare
from kimi_mm.cli.report import report
from kimi_mm.cli.resynth import resynth
from kimi_mm.cli.say import say
from kimi_mm.cli.serve import serve
from kimi_mm.cli.tokenize import tokenize
from kimi_mm.cli.train import train
from kimi_mm.cli.transcribe import transcribe

app = typer.Typer(
    name="kimi-mm",
    help="Speech, pictures and text through one model; transcribes on a laptop, offline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(transcribe)
app.command("describe")(describe_pictures)
app.command()(tokenize)
app.command()(resynth)
app.command()(say)
app.command(cls=TurnsInOrder)(chat)
app.command()(demo)
app.command()(info)
app.command()(convert)
app.command()(serve)
app.add_typer(eval_app, name="eval")
app.command()(plan)
app.command()(prepare)
app.command("check-data")(check_data)
app.command()(train)
app.command()(chain)
app.command()(report)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kimi-mm {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def run(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits the process.

    Args:
        arguments: without the program's name; None takes `sys.argv`.
    """
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    try:
        app(args=arguments, prog_name="kimi-mm")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if _interrupted(error):
            sys.exit(130)
        if debugging():
            raise
        complain(describe(error))
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _interrupted(error: BaseException) -> bool:
    """Tells whether Ctrl-C is behind an error: compiled modules that are being imported turn it into an ImportError."""
    cause = error.__cause__ or error.__context__
    return isinstance(error, KeyboardInterrupt) or (cause is not None and _interrupted(cause))


def _terminate(signum: int, frame: Any) -> None:
    sys.exit(128 + signum)
