"""How the command line reports trouble: one sentence on stderr and an exit code, never a traceback.

0 done    1 a file or an input could not be used    2 wrong usage    130 stopped by Ctrl-C    143 terminated
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable

from kimi_mm.errors import UserError


class UsageError(UserError):
    """A combination of arguments that makes no sense; exit code 2."""


def complain(message: str) -> None:
    """Writes one `kimi-mm: ...` line to stderr."""
    print(f"kimi-mm: {message}", file=sys.stderr, flush=True)


def debugging() -> bool:
    """Tells whether `KIMI_MM_DEBUG=1` asks for tracebacks."""
    return os.environ.get("KIMI_MM_DEBUG", "") not in ("", "0")


def describe(error: BaseException) -> str:
    """Turns an exception into the sentence that the user reads."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    if isinstance(error, MemoryError):
        return "not enough memory; try a shorter recording or fewer at a time."
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("kimi_mm"):
        return (
            f"the Python package '{error.name}' is missing; install what training and data preparation need: "
            "pip install 'kimi-mm[train,eval,synthesis,judges]'."
        )
    return f"internal error, {type(error).__name__}: {error} (KIMI_MM_DEBUG=1 shows the traceback)."


def for_each(names: Iterable[str], work: Callable[[str], None]) -> int:
    """Runs `work` on every name; a bad one gets its sentence and the others are still done.

    Args:
        names: recordings, as given on the command line.
        work: called with one name; UserError and OSError count as that file's failure.

    Returns:
        How many failed.
    """
    failed = 0
    for name in names:
        try:
            work(name)
        except BrokenPipeError:
            raise
        except (UserError, OSError) as error:
            if debugging():
                raise
            message = describe(error)
            label = "standard input" if name == "-" else name
            complain(message if label in message else f"{label}: {message}")
            failed += 1
    return failed
