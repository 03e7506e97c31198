"""Tensors in files as byte ranges, and the writer that puts them together anew; nothing is ever held whole.

    model.safetensors:  8 bytes, length of the header | JSON: name -> dtype, shape, range | bytes

A conversion is a list of `Target`s, each the bytes of its parts one after another, read and written in blocks of 8 MiB.
A shard is written aside and renamed when it is whole; `conversion.json` remembers the finished ones and their SHA-256,
so that a rerun goes on behind them. The index comes last: half a folder is never taken for a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kimi_mm.errors import CheckpointError

BLOCK = 8 * 2**20
JOURNAL = "conversion.json"
SUMS = "SHA256SUMS"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: where its bytes are, or the tensor itself, mapped from a `.pt` file or live.

    A live tensor may be of another type; it is cast to `dtype` as it is read.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    tensor: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def blocks(self, offset: int = 0, size: int | None = None) -> Iterator[memoryview]:
        """Yields the bytes from `offset` on, `size` of them, block by block."""
        end = self.size if size is None else offset + size
        if self.tensor is not None:
            whole = self.tensor.detach().to("cpu", DTYPES[self.dtype])
            data = whole.contiguous().flatten().view(torch.uint8).numpy().data
            for at in range(offset, end, BLOCK):
                yield data[at : min(at + BLOCK, end)]
            return
        try:
            with self.file.open("rb") as stream:
                stream.seek(self.start + offset)
                for at in range(offset, end, BLOCK):
                    want = min(BLOCK, end - at)
                    block = stream.read(want)
                    if len(block) != want:
                        raise CheckpointError(
                            f"{self.file}: ends in the middle of tensor '{self.name}'; copy it again."
                        )
                    yield memoryview(block)
        except OSError as error:
            raise CheckpointError(f"{self.file}: tensor '{self.name}' cannot be read ({error.strerror}).") from None


Part = tuple[Stored, int, int] | bytes  # a tensor, offset and size in bytes; or the bytes themselves


@dataclass(frozen=True)
class Target:
    """A tensor to be written: the bytes of its parts, one after another."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def blocks(self) -> Iterator[memoryview]:
        for part in self.parts:
            if isinstance(part, bytes):
                yield memoryview(part)
            else:
                yield from part[0].blocks(part[1], part[2])

    def read(self) -> torch.Tensor:
        """Puts the tensor together in memory."""
        data = torch.empty(self.size, dtype=torch.uint8)
        view, at = data.numpy().data, 0
        for block in self.blocks():
            view[at : at + len(block)] = block
            at += len(block)
        return data.view(DTYPES[self.dtype]).view(self.shape)


def safetensors_entries(file: Path) -> list[Stored]:
    """Lists the tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing, cut short or no safetensors file; names it.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header does not fit")
            header = json.loads(stream.read(length))
        entries = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"tensor '{name}' has the unknown type {entry['dtype']}")
            stored = Stored(file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            if stored.size != entry["data_offsets"][1] - entry["data_offsets"][0]:
                raise ValueError(f"tensor '{name}' and its range differ in size")
            if stored.start + stored.size > size:
                raise CheckpointError(f"{file}: cut short, tensor '{name}' is not whole; copy the file again.")
            entries.append(stored)
        return entries
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: damaged, not a safetensors file ({error}).") from None


def pickled_entries(file: Path, top: str) -> list[Stored]:
    """Lists the tensors below key `top` of a `.pt` file, read with `weights_only` and mapped, not loaded.

    Raises:
        CheckpointError: the file is missing, damaged, holds more than plain tensors, or lacks the key.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file.")
    try:
        values = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        tensors = values[top]
        pairs = [(str(name), tensor) for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)]
    except KeyError:
        raise CheckpointError(f"{file}: holds no '{top}'.") from None
    except Exception as error:  # torch raises many kinds on damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{file}: damaged, or more than plain tensors ({reason}).") from None
    return [Stored(file, name, NAMES[t.dtype], tuple(t.shape), tensor=t) for name, t in pairs]


# ---- writing -----------------------------------------------------------------------------------------------------


class Writer:
    """Writes the files of one folder, going on where an earlier run of the same conversion stopped.

    Args:
        folder: made if missing.
        fingerprint: of everything the result depends on; another one than the journal's starts afresh.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            journal = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
            if journal["fingerprint"] == fingerprint:
                self.done = dict(journal["done"])

    def shards(
        self,
        targets: Sequence[Target],
        shard_bytes: int,
        prefix: str = "",
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Writes `model-0000i-of-0000N.safetensors` and their index below the folder.

        Args:
            targets: in order; those that belong together (`NAME` and `NAME.scale`) stay in one file.
            shard_bytes: largest size of a file, but for single tensors that are larger.
            prefix: subfolder.
            progress: called with the bytes done since the last call.
        """
        groups = _split(targets, shard_bytes)
        index: dict[str, str] = {}
        for number, group in enumerate(groups, start=1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            if len(groups) == 1 and prefix:
                file = "model.safetensors"
            self.safetensors(str(Path(prefix) / file), group, progress)
            index.update({target.name: file for target in group})
        if len(groups) > 1 or not prefix:
            total = sum(target.size for target in targets)
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
            self.text(str(Path(prefix) / "model.safetensors.index.json"), text)

    def safetensors(self, name: str, targets: Sequence[Target], progress: Callable[[int], None] | None = None) -> None:
        """Writes one safetensors file, unless an earlier run finished it."""
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for target in targets:
            entry = {"dtype": target.dtype, "shape": list(target.shape), "data_offsets": [at, at + target.size]}
            header[target.name] = entry  # type: ignore[assignment]
            at += target.size
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        whole = 8 + len(head) + at
        if name in self.done and _size(self.folder / name) == whole:
            if progress:
                progress(at)
            return

        def content() -> Iterator[tuple[str, memoryview]]:
            yield "", memoryview(len(head).to_bytes(8, "little") + head)
            for target in targets:
                for block in target.blocks():
                    yield target.name, block
                    if progress:
                        progress(len(block))

        self.stream(name, content())

    def stream(self, name: str, content: Iterable[tuple[str, memoryview]]) -> None:
        """Writes a file from (tensor name, bytes), aside first; on any error nothing of it remains."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        aside, digest, tensor = path.with_name(path.name + ".tmp"), hashlib.sha256(), ""
        try:
            with aside.open("wb") as out:
                for tensor, block in content:  # noqa: B007  (the error names it)
                    digest.update(block)
                    out.write(block)
            os.replace(aside, path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            at = f" at tensor '{tensor}'" if tensor else ""
            raise CheckpointError(
                f"{path}: writing failed{at} ({error.strerror}); make room and run the same command to go on."
            ) from None
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        self.done[name] = digest.hexdigest()
        self._note()

    def adopt(self, aside: Path, name: str) -> None:
        """Takes over a file that was written aside by other means."""
        digest = hashlib.sha256()
        with aside.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
        os.replace(aside, self.folder / name)
        self.done[name] = digest.hexdigest()
        self._note()

    def text(self, name: str, text: str) -> None:
        """Writes a text file."""
        self.stream(name, [("", memoryview(text.encode("utf-8")))])

    def copy(self, source: Path, name: str) -> None:
        """Copies a small file."""
        self.stream(name, [("", memoryview(source.read_bytes()))])

    def finish(self) -> None:
        """Writes the checksums, in the form that `sha256sum -c` reads, and drops the journal."""
        sums = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.done.items()))
        self.text(SUMS, sums)
        (self.folder / JOURNAL).unlink(missing_ok=True)

    def check_room(self, need: int) -> None:
        """Raises CheckpointError when the disk cannot hold `need` more bytes than what is finished."""
        have = sum(_size(self.folder / name) for name in self.done)
        free = shutil.disk_usage(self.folder).free
        if need - have > free:
            raise CheckpointError(
                f"{self.folder}: needs {(need - have) / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB left."
            )

    def _note(self) -> None:
        aside = self.folder / (JOURNAL + ".tmp")
        with contextlib.suppress(OSError):  # without it a rerun starts earlier, that is all
            aside.write_text(json.dumps({"fingerprint": self.fingerprint, "done": self.done}), encoding="utf-8")
            os.replace(aside, self.folder / JOURNAL)


def fingerprint(targets: Iterable[Target], *settings: object) -> str:
    """Returns a digest of what a conversion will write, and of the files that it reads."""
    digest = hashlib.sha256(repr(settings).encode())
    files = set()
    for target in targets:
        digest.update(f"{target.name} {target.dtype} {target.shape}".encode())
        for part in target.parts:
            if not isinstance(part, bytes):
                digest.update(f"{part[0].name} {part[1]} {part[2]}".encode())
                files.add(part[0].file)
    for file in sorted(files):
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}".encode())
    return digest.hexdigest()


def verify(folder: Path) -> int:
    """Compares every file of a folder with its checksum; returns how many there are.

    Raises:
        CheckpointError: names the first file that is missing or different, or the list when there is none.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CheckpointError(f"{folder / SUMS}: cannot be read ({error.strerror}).") from None
    for line in lines:
        want, _, name = line.partition("  ")
        digest = hashlib.sha256()
        try:
            with (folder / name).open("rb") as stream:
                while block := stream.read(BLOCK):
                    digest.update(block)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read ({error.strerror}).") from None
        if digest.hexdigest() != want:
            raise CheckpointError(f"{folder / name}: differs from its checksum; convert or copy it again.")
    return len(lines)


def _split(targets: Sequence[Target], shard_bytes: int) -> list[list[Target]]:
    shards: list[list[Target]] = [[]]
    room = shard_bytes
    for family in _families(targets):
        size = sum(target.size for target in family)
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].extend(family)
        room -= size
    return shards


def _families(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Groups neighbours that are read together: the parts of a quantized matrix, length and direction of a filter."""
    family: list[Target] = []
    last = ""
    for target in targets:
        stem = target.name.removesuffix("_g").removesuffix("_v")
        stem = stem.removesuffix(".packed").removesuffix(".group_scale").removesuffix(".scale")
        if family and stem != last:
            yield family
            family = []
        family.append(target)
        last = stem
    if family:
        yield family


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
