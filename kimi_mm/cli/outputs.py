"""Where results go: standard output, one file, or one file per recording in a folder.

A file is written aside in its folder and renamed when complete, so that an interrupted command never leaves a
half-written one. Everything that can be checked before the work starts is checked before the work starts.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from pathlib import Path

from kimi_mm.cli.errors import UsageError
from kimi_mm.errors import UserError


def check_writable(path: Path) -> None:
    """Raises UserError if a file at `path` could not be written."""
    folder = path.parent
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file, or end it with '/'.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{path}: cannot be written, {folder} is not a folder.")
    try:
        exists = folder.exists()
        target = path.stat() if path.exists() else None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}).") from None
    if not exists:
        raise UserError(f"{path}: cannot be written, the folder {folder} does not exist.")
    place = path if target is not None and not stat.S_ISREG(target.st_mode) else folder
    if not os.access(place, os.W_OK):
        raise UserError(f"{path}: cannot be written, no permission to write in {place}.")


def write_file(path: Path, data: bytes) -> None:
    """Writes `data` aside and renames it to `path`; a device or pipe is written straight."""
    check_writable(path)
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path = Path(os.path.realpath(path))
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask()
    handle, aside = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.chmod(aside, mode)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise


class Destination:
    """Takes one result per recording and puts it where `--output` says.

    Args:
        inputs: the recordings, as given on the command line ("-" is standard input).
        output: None for standard output; an existing folder or a name that ends in "/" for one file per recording;
            anything else is one file for all of them.
        suffix: of the files in a folder, such as ".txt".
        joinable: whether several results may follow each other in one file.
        binary: whether results are bytes that should not go to standard output.

    Raises:
        UsageError: several results that cannot be joined, two recordings that would get the same file, or a result
            that would replace its own recording.
        UserError: a place that cannot be written.
    """

    def __init__(self, inputs: list[str], output: str | None, suffix: str, joinable: bool, binary: bool = False):
        self.suffix = suffix
        self.folder: Path | None = None
        self.file: Path | None = None
        self.parts: list[bytes] = []
        if inputs.count("-") > 1:
            raise UsageError("standard input ('-') can be read only once.")
        if output is None or output == "-":
            if binary:
                raise UsageError(f"{suffix} results are binary; say where they go with --output.")
        elif output.endswith(("/", os.sep)) or Path(output).is_dir():
            self.folder = Path(output)
            self._check_folder(inputs)
        else:
            self.file = Path(output)
            check_writable(self.file)
            self._check_not_input(self.file, inputs)
        if self.folder is None and len(inputs) > 1 and not joinable:
            raise UsageError(
                f"{len(inputs)} recordings make {len(inputs)} {suffix} files; give a folder: --output DIR/."
            )

    def put(self, name: str, data: bytes) -> None:
        """Takes the result of recording `name`; standard output and folders get it at once."""
        if self.folder is not None:
            write_file(self._in_folder(name), data)
        elif self.file is not None:
            self.parts.append(data)
        else:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    def close(self) -> None:
        """Writes what one file for all collected; nothing if no recording gave a result."""
        if self.file is not None and self.parts:
            write_file(self.file, b"".join(self.parts))

    def _in_folder(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / ((Path(name).stem if name != "-" else "stdin") + self.suffix)

    def _check_folder(self, inputs: list[str]) -> None:
        assert self.folder is not None
        taken: dict[Path, str] = {}
        for name in inputs:
            path = self._in_folder(name)
            if path in taken:
                raise UsageError(f"{taken[path]} and {name} would both be written to {path}; rename one of them.")
            taken[path] = name
            self._check_not_input(path, inputs)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: the folder cannot be made ({error.strerror}).") from None
        if not os.access(self.folder, os.W_OK):
            raise UserError(f"{self.folder}: no permission to write in this folder.")

    @staticmethod
    def _check_not_input(path: Path, inputs: list[str]) -> None:
        if path.exists() and any(name != "-" and Path(name).exists() and path.samefile(name) for name in inputs):
            raise UsageError(f"{path}: is one of the recordings; the result would replace it.")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
