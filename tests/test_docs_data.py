"""docs/data.md keeps its word: its examples pass the check, and its command trains on them."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from kimi_mm.data.check import check_files
from kimi_mm.data.document_config import LAYOUTS
from kimi_mm.training.freezing import PARTS
from kimi_mm.training.run import train

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```jsonl\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path):
    for name in ("clips", "pictures"):
        (tmp_path / name).mkdir()
    soundfile.write(tmp_path / "clips" / "a.wav", np.sin(np.arange(16_000) / 20), 16_000)
    Image.new("RGB", (40, 40), (220, 30, 30)).save(tmp_path / "pictures" / "a.png")
    for name, text in zip(("my.jsonl", "documents.jsonl"), EXAMPLES, strict=True):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_examples_can_be_used(folder):
    assert not check_files([folder / "my.jsonl"]).problems
    assert not check_files([folder / "documents.jsonl"], documents=True).problems


def test_the_command_trains_on_them(folder):
    assert "kimi-mm train sft/nano --data my.jsonl" in PAGE
    numbers = train("sft/nano", debug=True, output=folder / "run", data=[folder / "my.jsonl"])
    assert numbers["loss"] > 0
    shutil.rmtree(folder / "run")


def test_every_layout_and_part_is_explained():
    for name in (*LAYOUTS, *PARTS):
        assert f"`{name}`" in PAGE
