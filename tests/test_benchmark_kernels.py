"""The kernel benchmark at tiny sizes on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kernel_sweep, kernels
from benchmarks.kernel_cases import CASES, Case
from benchmarks.timing import Ceilings, Timer


def test_table_file_and_picture(tmp_path, capsys):
    kernels.main(["--debug", "--json", str(tmp_path / "out.json"), "--picture", str(tmp_path / "out.png")])
    results = json.loads((tmp_path / "out.json").read_text())
    assert list(results["rows"]) == list(CASES)
    for op, row in results["rows"].items():
        assert row["columns"]["reference"].get("error") is None, op
        assert row["columns"]["reference"]["eager_ms"] > 0.0
        assert row["floor_ms"] > 0.0
    assert (tmp_path / "out.png").stat().st_size > 10_000
    for line in results["accuracy"]:
        assert line["errors"]
        assert max(line["errors"].values()) < 1e-4, line
    printed = capsys.readouterr().out
    assert "On a CPU only the reference runs." in printed
    assert printed.rstrip().splitlines()[-1].startswith("cross_entropy_training")


def test_a_failing_operation_does_not_end_the_table(monkeypatch, capsys):
    def broken(device):
        def build():
            raise RuntimeError("no such kernel")

        return Case("broken", {"reference": build}, 1.0, 1.0)

    monkeypatch.setitem(kernels.CASES, "kda_decode", broken)
    kernels.main(["--debug", "--ops", "kda_decode,moe_forward"])
    printed = capsys.readouterr().out
    assert "RuntimeError: no such kernel" in printed
    assert "failed" in printed
    assert "moe_forward" in printed.splitlines()[-1]


def test_unknown_operations_are_refused(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--debug", "--ops", "kda_backwards"])
    assert "unknown 'kda_backwards'" in capsys.readouterr().err


def test_sweep_keeps_what_is_faster(monkeypatch, capsys):
    """A table whose `rows` decides the time; the entry that nothing reads is left alone."""
    tables = {"used": {"rows": 4}, "unused": {"rows": 4}}
    monkeypatch.setattr(kernel_sweep.importlib, "import_module", lambda name: type("Module", (), {"CONFIGS": tables}))

    def call():
        return torch.zeros(4000 // tables["used"]["rows"]).cumsum(0)

    class Fake(Timer):
        def eager(self, call, flush=True):
            return float(call().numel())

    case = Case("fake", {"reference": lambda: call}, 1.0, 1.0, tables=("kimi_mm.kernels.fake",))
    kernel_sweep.sweep(case, Fake("cpu"), Ceilings(1.0, 1.0), 60.0)
    assert tables == {"used": {"rows": 8}, "unused": {"rows": 4}}
    assert "fake.CONFIGS['used'] = {'rows': 8}" in capsys.readouterr().out


def test_warm_processes_run_every_operation_and_end(tmp_path):
    kernels.main(["--debug", "--warm", "2", "--ops", "kda_decode", "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text())["rows"]["kda_decode"]["columns"]["reference"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_warm", "cpu", "reference", "kda_decode,attn_res_forward", "2", "1"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )
    assert (done.returncode, done.stderr) == (0, "")
