"""`kimi-mm describe` on a tiny checkpoint: answers, several pictures, JSON, the drawn attention, and complaints."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

import kimi_mm
from kimi_mm.cli.describe import is_question
from kimi_mm.cli.main import run


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    complaints: list[str]


@pytest.fixture
def describe(monkeypatch, capfd, seeing, checkpoint, tmp_path):
    """Returns `describe(*arguments)`, run in a folder that holds red.png and blue.jpg."""
    real = kimi_mm.load
    monkeypatch.setattr(
        kimi_mm,
        "load",
        lambda name, device="cpu": seeing if str(name) == str(checkpoint) else real(name, device),
        False,
    )
    monkeypatch.delenv("KIMI_MM_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    for name, colour in (("red.png", "red"), ("blue.jpg", "blue")):
        Image.new("RGB", (60, 40), colour).save(name)

    def call(*arguments: object, model: object = checkpoint) -> Outcome:
        with pytest.raises(SystemExit) as stopped:
            run(["describe", *map(str, arguments), "--model", str(model), "--max-tokens", "6"])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Outcome(int(stopped.value.code or 0), out, [s for s in err.splitlines() if s.startswith("kimi-mm: ")])

    return call


def test_answers(describe, seeing):
    result = describe("red.png")
    assert (result.code, result.complaints) == (0, [])
    assert result.out == seeing.describe("red.png", max_tokens=6) + "\n"
    assert len(result.out) > 3
    asked = describe("red.png", "blue.jpg", "Which is red?")
    assert asked.out == seeing.describe(["red.png", "blue.jpg"], "Which is red?", max_tokens=6) + "\n"
    assert describe("red.png", "blue.jpg", "-Q", "Which is red?").out == asked.out


def test_each(describe, seeing):
    result = describe("red.png", "blue.jpg", "--each")
    names = ("red.png", "blue.jpg")
    assert result.out.splitlines() == [f"{name}: {seeing.describe(name, max_tokens=6)}" for name in names]


def test_json(describe, seeing):
    row = json.loads(describe("red.png", "What is red?", "--json").out)
    text = seeing.describe("red.png", "What is red?", max_tokens=6)
    items = [{"grid": [1, 4, 6], "tokens": 6, "seconds": None}]
    assert row == {"files": ["red.png"], "model": "seeing", "question": "What is red?", "text": text, "items": items}


def test_explain(describe, tmp_path):
    assert describe("red.png", "--explain", tmp_path / "out.png").code == 0
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG"
    result = describe("red.png", "--explain", tmp_path / "none" / "out.png")
    assert result.code == 1
    assert "does not exist" in result.complaints[0]
    assert describe("red.png", "blue.jpg", "--each", "--explain", "x.png").code == 2


def test_animations_and_tiny_pictures_are_said(describe):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save("moving.gif", save_all=True, append_images=frames[1:])
    result = describe("moving.gif")
    assert result.code == 0
    assert "moving.gif: is animated; only the first frame is looked at." in result.complaints[0]
    assert "less than one patch" in result.complaints[1]


def test_bad_pictures(describe, tmp_path):
    (tmp_path / "drawing.svg").write_text("<svg/>")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    bad = ["missing.png", "drawing.svg", "empty.png", "cut.png", "."]
    result = describe("red.png", *bad)
    assert (result.code, result.out, len(result.complaints)) == (1, "", len(bad))
    for name, line in zip(bad, result.complaints, strict=True):
        assert name in line
    result = describe("red.png", *bad, "--each")
    assert result.code == 1
    assert result.out.startswith("red.png: ") or result.out.count("\n") == 1
    assert "5 of 6" in result.complaints[-1]
    assert describe("-", "-").code == 2


def test_checkpoint_without_eyes(describe, ears):
    result = describe("red.png", model=ears)
    assert result.code == 1
    assert result.complaints == ["kimi-mm: model 'ears' has no eyes; take a checkpoint whose config has 'vision'."]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("What is it?", True),
        ("Count", True),
        ("Count the red dogs.", True),
        ("missing.png", False),
        ("my holiday photo.JPG", False),
        ("folder/picture", False),
        ("data:image/png;base64,AA", False),
        ("http://x/y?", False),
        ("-", False),
        ("x" * 5000, True),
    ],
)
def test_questions_are_told_from_files(text, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_question(text) == wanted
    if "/" not in text and len(text) < 99:
        np.save(tmp_path / "x.npy", np.zeros(1))
        (tmp_path / text).touch()
        assert not is_question(text)
