"""Where samples lie: lines of a JSONL file, or samples of a WebDataset tar, read one at a time and never unpacked.

    my.jsonl            one JSON object a line; media are paths relative to the file's folder, which they never leave
    my.tar              0001.json + 0001.wav + 0001.seg1.png ...: members that share a key are one sample;
                        media are named by member ("0001.wav") or by what follows the key ("wav", "seg1.png")
                        0001.txt + 0001.jpg, without a .json, is the row {"text": ..., "image": "jpg"}

Only offsets are kept in memory. A tar is read by offset, links and other special members are left alone.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kimi_mm.data.manifest import resolve
from kimi_mm.errors import UserError

Source = Path | bytes
_BLOCK = 1 << 20
_SUFFIXES = {
    "audio": ("wav", "flac", "mp3", "ogg", "opus", "aiff"),
    "image": ("png", "jpg", "jpeg", "webp", "bmp", "gif"),
    "video": ("mp4", "mov", "mkv", "webm", "avi"),
}


class RowError(UserError):
    """A sample that cannot be used: `reason` says what is wrong with it and `fix` what to do."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason}; {fix}")
        self.reason, self.fix = reason, fix


@dataclass(frozen=True)
class Row:
    """One sample as it lies on disk: its JSON text, and a function from a medium's name to its path or bytes."""

    file: str
    line: int  # from 1; of a tar, the sample's number
    key: str  # of a tar, the samples' key; "" otherwise
    raw: bytes
    fetch: Callable[[str], Source]

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" + (f" ({self.key})" if self.key else "")

    def value(self) -> dict:
        """Returns the row's object; RowError when it is not one."""
        try:
            value = json.loads(self.raw.decode("utf-8"))
            if b"\\u" in self.raw:  # escapes can spell half of a pair, which is no text
                json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError(f"byte {error.start + 1} is not UTF-8", "save the file as UTF-8") from None
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            raise RowError(f"the escape {half} is half a character", "write whole characters") from None
        except (ValueError, RecursionError) as error:
            at = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise RowError(f"not valid JSON{at} ({reason})", "write one JSON object a line") from None
        if not isinstance(value, dict):
            raise RowError(f"a JSON {type(value).__name__}, not an object", "write one JSON object a line")
        return value


class JsonlRows:
    """The lines of a JSONL file that are not blank."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.parent
        self._lines: list[tuple[int, int, int]] = []  # number, offset, bytes
        at = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._lines.append((number, at, len(line)))
                at += len(line)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Row:
        number, offset, size = self._lines[index]
        with self.path.open("rb") as file:
            file.seek(offset)
            raw = file.read(size).strip()
        # A byte order mark is what some editors put before the first line.
        raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        return Row(str(self.path), number, "", raw, self._fetch)

    def _fetch(self, name: str) -> Source:
        target = resolve(self.folder, name, "media")
        try:
            there = target.is_file()
        except OSError:  # a name that is too long, or a folder that may not be looked into
            there = False
        if not there:
            raise RowError(f"'{name}' is not a file in {self.folder}", "paths are relative to the JSONL file's folder")
        return target


class TarRows:
    """The samples of an uncompressed WebDataset tar, in the order of their first members."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if member.isreg():
                        key, suffix = split_key(member.name)
                        self._samples.setdefault(key, {})[suffix] = (member.offset_data, member.size)
        except (tarfile.TarError, EOFError) as error:
            raise UserError(
                f"{path}: not an uncompressed tar ({error}); gunzip it first if it is compressed."
            ) from None
        self._keys = list(self._samples)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Row:
        key = self._keys[index]
        members = self._samples[key]
        raw = self._read(members["json"]) if "json" in members else self._plain_row(members)

        def fetch(name: str) -> Source:
            inside = name.removeprefix(f"{key}.") if name.startswith(f"{key}.") else name
            if inside not in members or inside == "json":
                known = ", ".join(f"'{suffix}'" for suffix in sorted(set(members) - {"json"})) or "none"
                raise RowError(f"sample '{key}' has no member '{name}'", f"its members are {known}")
            return self._read(members[inside])

        return Row(str(self.path), index + 1, key, raw, fetch)

    def _read(self, place: tuple[int, int]) -> bytes:
        with self.path.open("rb") as file:
            file.seek(place[0])
            return file.read(place[1])

    def _plain_row(self, members: dict[str, tuple[int, int]]) -> bytes:
        """Makes the row of a sample that has a text and media, and no JSON."""
        row: dict[str, str] = {}
        if "txt" in members:
            row["text"] = self._read(members["txt"]).decode("utf-8", "replace").strip()
        for kind, suffixes in _SUFFIXES.items():
            found = [suffix for suffix in members if suffix.lower() in suffixes]
            if found:
                row[kind] = found[0]
        return json.dumps(row).encode()


Rows = JsonlRows | TarRows


def open_rows(path: str | Path) -> Rows:
    """Opens a `.jsonl` or `.tar` file.

    Raises:
        UserError: when it cannot be read, is of another kind, or holds nothing.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".tar"):
        raise UserError(f"{path}: data must be a .jsonl or .tar file.")
    try:
        rows = JsonlRows(path) if path.suffix == ".jsonl" else TarRows(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    if not len(rows):
        raise UserError(f"{path}: holds no samples.")
    return rows


def split_key(name: str) -> tuple[str, str]:
    """Splits a member's name at the first dot of its last part: "a/0001.seg1.png" is ("a/0001", "seg1.png")."""
    path = PurePosixPath(name.removeprefix("./"))
    stem, _, suffix = path.name.partition(".")
    return str(path.with_name(stem)) if stem else str(path), suffix
