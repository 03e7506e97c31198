"""Every example runs, at debug size, and says what it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_mm.cli.demo import CLIPS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
WORDS = "press one now"


def run(*arguments: object, folder: Path) -> str:
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_api(tmp_path):
    out = run(EXAMPLES / "python_api.py", folder=tmp_path)
    assert out.count(WORDS) == 3  # as a whole, as a segment, word by word
    assert "91 codes" in out


def test_microphone_fed_from_a_file(tmp_path):
    out = run(EXAMPLES / "microphone.py", "--fast", "--file", CLIPS / "vm-instructions.flac", folder=tmp_path)
    assert WORDS in out
    assert "after the pause" in out


def test_finetune(tmp_path):
    pytest.importorskip("accelerate", reason="needs the extra 'train'")
    out = run(EXAMPLES / "finetune.py", "--steps", 1, "--clips", 2, "--output", "mine", folder=tmp_path)
    assert [line.split(":")[0] for line in out.splitlines()] == ["before", "after"]
    assert (tmp_path / "mine" / "model" / "config.yaml").is_file()
    rows = [json.loads(line) for line in (tmp_path / "mine" / "data" / "my.jsonl").read_text().splitlines()]
    assert [row["messages"][1]["role"] for row in rows] == ["assistant"] * 2


def test_notebook(tmp_path):
    """Its cells run in order; what stands in it was made by a whole run."""
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    script = tmp_path / "tour.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in code))
    out = run(script, folder=tmp_path)
    assert WORDS in out
    assert "the same: True" in out
    assert "of the words are wrong" in out
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    shown = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in shown if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in shown)
