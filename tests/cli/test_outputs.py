"""Files are written aside and renamed; places that cannot be written are refused before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kimi_mm.cli.outputs import Destination, check_writable, write_file
from kimi_mm.errors import UserError


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    target.write_bytes(b"old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file(target, b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_new_files_follow_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        write_file(tmp_path / "a", b"x")
    finally:
        os.umask(previous)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_device_is_written_to_and_not_replaced():
    write_file(Path(os.devnull), b"x")
    assert not os.path.isfile(os.devnull)


def test_folders_are_not_files(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        check_writable(tmp_path)


def test_standard_output_takes_no_binary():
    with pytest.raises(UserError, match="--output"):
        Destination(["a.wav"], None, ".npy", joinable=False, binary=True)


def test_standard_input_has_a_name_in_a_folder(tmp_path):
    destination = Destination(["-"], f"{tmp_path}/", ".txt", joinable=True)
    destination.put("-", b"hello\n")
    destination.close()
    assert (tmp_path / "stdin.txt").read_bytes() == b"hello\n"
