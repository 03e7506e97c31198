import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from kimi_mm.data import packages
from kimi_mm.data.packages import PackageError, debian_package, unpack


def make_deb(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    parts = b"!<arch>\n"
    for name, data in (("debian-binary", b"2.0\n"), ("data.tar.xz", buffer.getvalue())):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n"
        parts += header.encode() + data + b"\n" * (len(data) % 2)
    path.write_bytes(parts)
    return path


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KIMI_MM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_unpacks_a_debian_package_found_by_name(tmp_path: Path) -> None:
    program = tarfile.TarInfo("./usr/bin/tool")
    program.mode = 0o755
    members = [
        (program, b"#!"),
        (tarfile.TarInfo("./usr/share/a.txt"), b"text"),
        (link("./usr/bin/alias", "tool"), b""),
    ]
    make_deb(tmp_path / "thing_1.2_all.deb", members)
    root = debian_package("thing", tmp_path)
    assert (root / "usr/share/a.txt").read_bytes() == b"text"
    assert (root / "usr/bin/tool").stat().st_mode & 0o100
    assert (root / "usr/bin/alias").read_bytes() == b"#!"
    (root / "usr/share/a.txt").write_bytes(b"kept")
    assert (debian_package("thing", tmp_path) / "usr/share/a.txt").read_bytes() == b"kept"


def test_a_changed_package_is_unpacked_again(tmp_path: Path) -> None:
    make_deb(tmp_path / "thing_1.deb", [(tarfile.TarInfo("a"), b"one")])
    debian_package("thing", tmp_path)
    make_deb(tmp_path / "thing_1.deb", [(tarfile.TarInfo("a"), b"two")])
    assert (debian_package("thing", tmp_path) / "a").read_bytes() == b"two"


@pytest.mark.parametrize("name", ["../escape", "/escape", "a/../../escape"])
def test_members_cannot_leave_the_folder(tmp_path: Path, cache: Path, name: str) -> None:
    deb = make_deb(tmp_path / "evil_1.deb", [(tarfile.TarInfo(name), b"x")])
    with pytest.raises(PackageError, match="outside its folder"):
        unpack(deb)
    wheel = tmp_path / "evil-1.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(PackageError, match="outside its folder"):
        unpack(wheel)
    assert not list(tmp_path.rglob("escape"))
    assert not list((cache / "unpacked").iterdir())


def test_links_cannot_leave_the_folder(tmp_path: Path) -> None:
    deb = make_deb(tmp_path / "evil_1.deb", [(link("usr/out", "../../.."), b""), (tarfile.TarInfo("usr/out/x"), b"x")])
    with pytest.raises(PackageError, match="points outside"):
        unpack(deb)
    absolute = make_deb(tmp_path / "conf_1.deb", [(link("usr/conf", "/etc"), b"")])
    assert not (unpack(absolute) / "usr/conf").exists()


def test_damaged_packages_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad_1.deb").write_bytes(b"not a package")
    with pytest.raises(PackageError, match=r"bad_1\.deb: is not a Debian package"):
        debian_package("bad", tmp_path)
    good = make_deb(tmp_path / "cut_1.deb", [(tarfile.TarInfo("a"), b"x" * 5000)])
    good.write_bytes(good.read_bytes()[:-40])
    with pytest.raises(PackageError, match=r"cut_1\.deb: cannot be unpacked"):
        debian_package("cut", tmp_path)


def test_missing_package_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(PackageError, match="--packages"):
        debian_package("nowhere", tmp_path)
    with pytest.raises(PackageError, match="is not a folder"):
        debian_package("nowhere", tmp_path / "missing")
