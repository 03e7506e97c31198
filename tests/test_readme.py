"""README.md keeps its word: its commands run, its links lead somewhere, its scores are the model card's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_mm.evaluation.report import BEGIN, END

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(
    r"(?:<!-- not run in the tests: (?P<reason>[^\n]+) -->\n)?```(?P<kind>bash|python)\n(?P<code>.*?)```", re.S
)
BLOCKS = list(FENCE.finditer(README))
RUN = [block for block in BLOCKS if not block["reason"]]
COMMANDS = [line for block in RUN if block["kind"] == "bash" for line in block["code"].splitlines() if line.strip()]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder that looks like the repository's root, in which commands may leave files."""
    for name in ("kimi_mm", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(arguments: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        arguments, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, checkout):
    run(["bash", "-euo", "pipefail", "-c", command], checkout)


@pytest.mark.parametrize("code", [block["code"] for block in RUN if block["kind"] == "python"])
def test_python(code, checkout):
    assert run([sys.executable, "-c", code], checkout).strip()


def test_what_is_run_and_what_is_not():
    assert len(COMMANDS) >= 5
    reasons = {block["reason"] for block in BLOCKS if block["reason"]}
    assert all("packages" in reason or "GPU" in reason or "data" in reason for reason in reasons)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    file = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (file.parent / target).exists(), target


def test_scores_are_those_of_the_model_card():
    card = (ROOT / "kimi_mm" / "pretrained" / "nano" / "README.md").read_text(encoding="utf-8")
    tables = [page.split(BEGIN)[1].split(END)[0].strip() for page in (README, card)]
    assert tables[0] == tables[1]
    assert tables[0].startswith("| model | test set |")
