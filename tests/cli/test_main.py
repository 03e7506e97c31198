"""Starting the command: light, documented, the same under both names."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kimi_mm import __version__

COMMANDS = ("transcribe", "tokenize", "demo", "info", "eval", "prepare", "train")


@pytest.mark.parametrize("arguments", [["--help"], ["transcribe", "--help"], ["eval", "asr", "--help"], ["--version"]])
def test_start_imports_nothing_heavy(arguments):
    script = (
        "import sys\n"
        "from kimi_mm.cli.main import run\n"
        "try:\n"
        f"    run({arguments!r})\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'matplotlib', 'soundfile'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_models_are_loaded_without_torchs_compiler():
    script = (
        "import sys\n"
        "import kimi_mm.pipeline\n"
        "import kimi_mm.serving.app\n"
        "assert 'torch._dynamo' not in sys.modules\n"  # two seconds of every command
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_help_names_every_command():
    done = subprocess.run([sys.executable, "-m", "kimi_mm", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for command in COMMANDS:
        assert command in done.stdout


def test_version_of_the_module():
    done = subprocess.run([sys.executable, "-m", "kimi_mm", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"kimi-mm {__version__}\n"


def test_a_closed_pipe_is_no_error(clips):
    """As in `kimi-mm tokenize ... | head -0`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kimi_mm", "tokenize", str(clips[0][0])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=120)
    assert err == b""
    assert process.returncode == 1
