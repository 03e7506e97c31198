"""`kimi-mm tokenize`: codes at 12.5 a second, in three formats that agree."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import soundfile
from safetensors import safe_open


def test_formats_agree(kimi, clips, tmp_path, nano):
    path, _ = clips[0]
    row = json.loads(kimi("tokenize", path).out)
    count = math.ceil(soundfile.info(path).duration * 12.5)
    assert (row["file"], row["rate"], len(row["codes"])) == (str(path), 12.5, count)
    assert kimi("tokenize", path, "-f", "npy", "-o", tmp_path / "a.npy").code == 0
    assert np.load(tmp_path / "a.npy").tolist() == row["codes"]
    assert kimi("tokenize", path, "-f", "safetensors", "-o", f"{tmp_path}/").code == 0
    with safe_open(tmp_path / f"{path.stem}.safetensors", framework="np") as file:
        assert file.get_tensor("codes").tolist() == row["codes"]
        assert file.get_tensor("features").shape == (count, nano.config.audio.feature_size)
        assert file.metadata()["model"] == "nano"


@pytest.mark.parametrize("arguments", [["-f", "npy"], ["-f", "safetensors", "-o", "-"]])
def test_binary_needs_a_file(kimi, clips, arguments):
    result = kimi("tokenize", clips[0][0], *arguments)
    assert (result.code, result.out) == (2, "")
    assert "--output" in result.complaints[0]


def test_many_into_one_jsonl(kimi, clips, tmp_path):
    paths = [path for path, _ in clips[:2]]
    assert kimi("tokenize", *paths, "-o", tmp_path / "codes.jsonl").code == 0
    rows = [json.loads(line) for line in (tmp_path / "codes.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [str(path) for path in paths]
