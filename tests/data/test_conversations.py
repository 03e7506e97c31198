"""Rows of JSONL files and tars: what is read, and that every bad line is named with its reason."""

import base64
import io
import json
import tarfile

import numpy as np
import pytest
import soundfile
from PIL import Image

from kimi_mm.data.check import check_files
from kimi_mm.data.conversations import parse_conversation, parse_document
from kimi_mm.data.rows import RowError, open_rows, split_key
from kimi_mm.errors import UserError


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


def wav() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(4000) / 9), 16_000, format="WAV")
    return file.getvalue()


def talk(*parts, answer="Yes."):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]}


TEXT = {"type": "text", "text": "Is it?"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.png").write_bytes(png())
    (tmp_path / "media" / "a.wav").write_bytes(wav())
    (tmp_path / "media" / "broken.wav").write_bytes(b"RIFF nothing")
    return tmp_path


def write(folder, *rows):
    path = folder / "my.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_every_way_to_name_a_medium(folder):
    inline = "data:image/png;base64," + base64.b64encode(png()).decode()
    sound = base64.b64encode(wav()).decode()
    path = write(
        folder,
        talk({"type": "image", "image": "media/a.png"}, TEXT),
        talk({"type": "image_url", "image_url": {"url": inline}}, TEXT),
        "",
        talk({"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}}),
        talk({"type": "audio", "audio": "media/a.wav"}),
    )
    rows = open_rows(path)
    parts = [parse_conversation(rows[i])[0]["content"][0] for i in range(len(rows))]
    assert parts[0] == {"type": "image", "image": folder / "media" / "a.png"}
    assert parts[1] == {"type": "image", "image": png()}
    assert parts[2] == {"type": "audio", "audio": wav()}
    assert parts[3] == {"type": "audio", "audio": folder / "media" / "a.wav"}
    assert [rows[i].line for i in range(4)] == [1, 2, 4, 5]
    assert not check_files([path]).problems


def test_kimi_audio_lines_are_taken(folder):
    turns = [("user", "text", "Write it down."), ("user", "audio", "media/a.wav"), ("assistant", "text", "Beep.")]
    line = {
        "task_type": "understanding",
        "conversation": [dict(zip(("role", "message_type", "content"), t, strict=True)) for t in turns],
    }
    (row,) = [open_rows(write(folder, line))[0]]
    messages = parse_conversation(row)
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert [part["type"] for part in messages[0]["content"]] == ["text", "audio"]


BAD = [
    ("{", "not valid JSON", "one JSON object a line"),
    ("[1]", "a JSON list", "object"),
    ({"mesages": []}, "no 'messages'", "rename 'mesages'"),
    ({"messages": []}, "empty", "non-empty list"),
    ({"messages": [{"role": "usr", "content": "a"}]}, "role 'usr'", "use 'user'"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no assistant message", "add the answer"),
    ({"messages": [{"role": "user", "content": []}, {"role": "assistant", "content": "a"}]}, "no content", "non-empty"),
    (talk({"type": "picture", "picture": "a"}), "type 'picture'", "use one of"),
    (talk({"type": "image", "image": "media/none.png"}), "not a file", "relative to"),
    (talk({"type": "image", "image": "../a.png"}), "leaves the folder", "beside the data file"),
    (talk({"type": "image", "image": "/etc/passwd"}), "leaves the folder", "beside the data file"),
    (talk({"type": "image", "image": "a\0.png"}), "zero byte", ""),
    (talk({"type": "image", "image": "a" * 300 + ".png"}), "not a file", "relative to"),
    (talk(TEXT, answer="\ud83d"), "half a character", "whole characters"),
    (talk({"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}), "is an address", "download"),
    (talk({"type": "image_url", "image_url": {"url": "data:image/png;base64,!!"}}), "base64", "encode"),
    (talk({"type": "image", "image": "media/a.wav"}), "a.wav", ""),
    (talk({"type": "audio", "audio": "media/broken.wav"}), "broken.wav", ""),
    (talk(TEXT, answer=[{"type": "image", "image": "media/a.png"}]), "assistant shows a picture", "user messages"),
    (talk(TEXT, answer="  "), "no text", "non-empty string"),
]


def test_every_bad_line_is_listed_with_reason_and_advice(folder):
    path = write(folder, talk(TEXT), *(row for row, _, _ in BAD), talk(TEXT))
    report = check_files([path])
    assert report.samples == len(BAD) + 2
    assert [problem.line for problem in report.problems] == list(range(2, len(BAD) + 2))
    for problem, (_, reason, fix) in zip(report.problems, BAD, strict=True):
        assert reason in problem.reason
        assert fix in problem.fix
        assert str(problem).startswith(f"{path}:{problem.line}: ")
    short = report.lines(3)
    assert len(short) == 5
    assert short[3] == f"... and {len(BAD) - 3} more."
    report.write(folder / "bad.jsonl")
    assert [json.loads(line)["line"] for line in (folder / "bad.jsonl").read_text().splitlines()][-1] == len(BAD) + 1


def test_links_do_not_lead_out_of_the_folder(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    outside.write_bytes(png())
    (folder / "media" / "link.png").symlink_to(outside)
    report = check_files([write(folder, talk({"type": "image", "image": "media/link.png"}))])
    assert "leaves the folder" in report.problems[0].reason


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("x.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


def test_tars_are_read_in_place(tmp_path):
    by_name = json.dumps(talk({"type": "image", "image": "a/01.seg1.png"}, TEXT)).encode()
    by_suffix = json.dumps(talk({"type": "audio", "audio": "wav"})).encode()
    missing = json.dumps(talk({"type": "audio", "audio": "02.wav"})).encode()
    path = tar(
        tmp_path / "my.tar",
        {"a/01.json": by_name, "a/01.seg1.png": png(), "b.json": by_suffix, "b.wav": wav(), "c.json": missing},
    )
    rows = open_rows(path)
    assert parse_conversation(rows[0])[0]["content"][0] == {"type": "image", "image": png()}
    assert parse_conversation(rows[1])[0]["content"][0] == {"type": "audio", "audio": wav()}
    report = check_files([path])
    assert (report.samples, report.media) == (3, {"image": 1, "audio": 1})
    assert [(p.line, p.key) for p in report.problems] == [(3, "c")]
    assert "no member '02.wav'" in report.problems[0].reason


def test_a_tar_of_pairs_is_documents(tmp_path):
    rows = open_rows(tar(tmp_path / "pairs.tar", {"1.jpg": png(), "1.txt": b"A red field.\n"}))
    parts = parse_document(rows[0])
    assert parts == [{"type": "image", "image": png()}, {"type": "text", "text": "A red field."}]
    with pytest.raises(RowError, match="no 'messages'"):
        parse_conversation(rows[0])


def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 99)
    (tmp_path / "b.jsonl").write_text("\n\n")
    for name, message in {
        "a.tar": "not an uncompressed tar",
        "b.jsonl": "no samples",
        "c.jsonl": "cannot be read",
        "d.csv": "must be",
    }.items():
        with pytest.raises(UserError, match=message):
            open_rows(tmp_path / name)
        (problem,) = check_files([tmp_path / name]).problems
        assert message in problem.reason


@pytest.mark.parametrize(
    ("name", "parts"), [("1.json", ("1", "json")), ("./a.b/2.x.png", ("a.b/2", "x.png")), ("plain", ("plain", ""))]
)
def test_keys(name, parts):
    assert split_key(name) == parts
