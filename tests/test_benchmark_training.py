"""The training and scaling benchmarks at debug size on a CPU."""

import json

import pytest

from benchmarks import scaling, training


def test_training_compares_ours_and_theirs(tmp_path):
    pytest.importorskip("transformers")
    lines: list[str] = []
    training.main(["--debug", "--peak-tflops", "0.1", "--json", str(tmp_path / "out.json")], note=lines.append)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert list(results) == list(training.CONTESTANTS)
    assert not any("error" in row for row in results.values()), results
    assert results["theirs"]["first_loss"] == pytest.approx(results["same-shape"]["first_loss"], abs=1e-4)
    assert all(row["tokens_per_second"] > 0 and row["mfu"] > 0 for row in results.values())
    assert any("AttnRes costs" in line for line in lines)
    assert sum("against theirs" in line for line in lines) == 3


def test_a_step_of_several_micro_batches(tmp_path):
    """It starts from the same loss, and its speed is that of all its tokens."""
    found = {}
    for number in (1, 3):
        out = tmp_path / f"{number}.json"
        options = ["--debug", "--contestants", "muonclip", "--micro-batches", str(number), "--json", str(out)]
        lines: list[str] = []
        training.main(options, note=lines.append)
        assert any(f"{number} times a step" in line for line in lines)
        found[number] = json.loads(out.read_text())["results"]["muonclip"]
    assert found[1]["first_loss"] == pytest.approx(found[3]["first_loss"], abs=1e-5)
    for number, row in found.items():
        seconds = row["products"] + row["optimizer"]
        assert row["tokens_per_second"] == pytest.approx(48 * number / seconds)


@pytest.mark.slow
def test_scaling_gives_equal_losses(tmp_path, capsys):
    """Experts and rows over two processes, and one process, which is measured once for both."""
    scaling.main(["--debug", "--modes", "expert", "context", "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())
    assert not any("error" in row for row in rows), rows
    assert [(row["mode"], row["gpus"]) for row in rows] == [(m, n) for m in ("expert", "context") for n in (1, 2)]
    assert rows[0]["tokens_per_second"] == rows[2]["tokens_per_second"]
    for two in rows[1::2]:
        assert two["difference"] < 1e-4
        assert min(rows[0]["tokens_per_second"], two["tokens_per_second"], two["sent"]) > 0
    assert capsys.readouterr().out.count("\n") == 5
