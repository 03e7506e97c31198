"""Manifests of prepared data: what a folder holds, with checksums, and rows that are validated when read.

    folder/
      manifest.json            {"version": 1, "kind": ..., "files": [{path, bytes, sha256}], "meta": {...}}
      *.jsonl                  one object a line
      *.npy, *.flac, ...       what the rows point at

Paths are relative, with "/", and never leave the folder. Files are written aside and renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from kimi_mm.data.packages import sha256
from kimi_mm.errors import UserError

MANIFEST = "manifest.json"
VERSION = 1


class ManifestError(UserError):
    """Prepared data that is missing, damaged or points outside its folder; names the file and the line."""


@dataclass(frozen=True)
class Manifest:
    """A folder's manifest: `files` maps a relative path to (bytes, sha256)."""

    folder: Path
    kind: str
    files: dict[str, tuple[int, str]]
    meta: dict[str, Any] = field(default_factory=dict)


def resolve(folder: Path, name: object, where: str) -> Path:
    """Returns the path of a relative name inside the folder.

    Raises:
        ManifestError: when the name is not a string, is absolute or leaves the folder, also through a link.
    """
    if not isinstance(name, str) or not name:
        raise ManifestError(f"{where}: a path must be a non-empty string, got {name!r}.")
    if "\0" in name:
        raise ManifestError(f"{where}: {name!r} has a zero byte, which no path can have.")
    path = PurePosixPath(name)
    target = folder.joinpath(*path.parts)
    outside = path.is_absolute() or ".." in path.parts or "\\" in name
    if outside or not target.resolve().is_relative_to(folder.resolve()):
        raise ManifestError(f"{where}: path '{name}' leaves the folder {folder}; refused.")
    return target


def write_manifest(folder: str | Path, kind: str, paths: Iterable[Path], meta: dict[str, Any] | None = None) -> None:
    """Writes `manifest.json` for the files given, which must lie in the folder."""
    folder = Path(folder)
    files = [
        {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(paths)
    ]
    values = {"version": VERSION, "kind": kind, "files": files, "meta": meta or {}}
    write_aside(folder / MANIFEST, (json.dumps(values, indent=1) + "\n").encode())


def read_manifest(folder: str | Path, kind: str | None = None, *, verify: bool = False) -> Manifest:
    """Reads and checks a folder's manifest.

    Args:
        folder: the prepared folder.
        kind: refuse other kinds; None takes any.
        verify: also read every file and compare its SHA-256.

    Raises:
        ManifestError: on a missing, malformed or contradicted manifest.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); prepare the data first.") from None
    except ValueError as error:
        raise ManifestError(f"{path}: not valid JSON ({error}); prepare the data again.") from None
    if not isinstance(values, dict) or values.get("version") != VERSION or not isinstance(values.get("files"), list):
        raise ManifestError(f"{path}: not a manifest of version {VERSION}; prepare the data again.")
    if kind is not None and values.get("kind") != kind:
        raise ManifestError(f"{path}: holds '{values.get('kind')}' data, but '{kind}' is needed.")
    files = {}
    for number, row in enumerate(values["files"]):
        where = f"{path}: files[{number}]"
        try:
            name, size, checksum = row["path"], int(row["bytes"]), str(row["sha256"])
        except (KeyError, TypeError, ValueError):
            raise ManifestError(f"{where}: needs path, bytes and sha256.") from None
        target = resolve(folder, name, where)
        if not target.is_file():
            raise ManifestError(f"{where}: '{name}' is missing; prepare the data again.")
        if target.stat().st_size != size or (verify and sha256(target) != checksum):
            raise ManifestError(f"{where}: '{name}' differs from its checksum; delete it and prepare the data again.")
        files[name] = (size, checksum)
    return Manifest(folder, values.get("kind", ""), files, values.get("meta", {}))


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_aside(Path(path), "".join(lines).encode("utf-8"))


def read_rows(path: str | Path, required: dict[str, type] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the objects of a `.jsonl` file.

    Args:
        path: the file.
        required: keys that every row must have and their types; an int passes as a float.

    Raises:
        ManifestError: `file:line:` and what is wrong.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read ({error}).") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ManifestError(f"{path}:{number}: not valid JSON ({error}).") from None
        if not isinstance(row, dict):
            raise ManifestError(f"{path}:{number}: expected an object, got {type(row).__name__}.")
        for key, kind in (required or {}).items():
            if key not in row:
                raise ManifestError(f"{path}:{number}: missing key '{key}'.")
            value = row[key]
            if not (type(value) is kind or (kind is float and type(value) is int)):
                raise ManifestError(f"{path}:{number}: '{key}' must be {kind.__name__}, got {value!r}.")
        yield row


def write_aside(path: Path, data: bytes) -> None:
    """Writes a file under another name and renames it, so that no reader sees half of it; what failed is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
