"""The two launchers start a run of several processes, which ends with one model."""

import subprocess
import sys

import pytest

from kimi_mm.checkpoint import load_checkpoint

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launched_run(launcher, tmp_path):
    arguments = [*LAUNCHERS[launcher], "-m", "kimi_mm", "train", "text/nano", "--debug", "--output", str(tmp_path)]
    overrides = ["gradient_accumulation=2", "cuda_graphs=false", "steps=2", "parallel={data: fsdp}"]
    done = subprocess.run([sys.executable, *arguments, *overrides], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("step 2/2") == 1
    load_checkpoint(tmp_path / "model")
    assert (tmp_path / "step-0000002" / "shards" / ".metadata").is_file()
