"""How fast and how large `kimi-mm transcribe` is on this machine: `make bench`.

Prints start time (a fresh process that shows its help), load time, latency and real-time factor over the shipped real
recordings (one at a time, three rounds after one to warm up), the real-time factor of all of them as one long
recording, and peak memory.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time

import numpy as np


def main() -> None:
    """Measures and prints a table."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kimi_mm", "--help"], check=True, capture_output=True)
    rows = [("start, --help", f"{time.perf_counter() - start:.2f} s")]

    start = time.perf_counter()
    import torch

    import kimi_mm
    from kimi_mm.audio.io import read_audio
    from kimi_mm.cli.demo import CLIPS, read_clips
    from kimi_mm.evaluation.asr import SAMPLE_RATE
    from kimi_mm.evaluation.result import peak_memory_mib

    engine = kimi_mm.load("nano")
    rows.append(("import and load nano", f"{time.perf_counter() - start:.2f} s"))

    waves = [read_audio(CLIPS / clip["file"])[0] for clip in read_clips()]
    for wave in waves:
        engine.transcribe(wave)
    took = np.array([[_seconds(engine, wave) for wave in waves] for _ in range(3)])
    lengths = np.array([len(wave) / SAMPLE_RATE for wave in waves])
    p50, p90, p99 = np.percentile(took, (50, 90, 99))
    rows.append((f"latency of {len(waves)} clips, p50 / p90 / p99", f"{p50:.3f} / {p90:.3f} / {p99:.3f} s"))
    rows.append(("real-time factor, clip by clip", f"{took.sum() / (3 * lengths.sum()):.4f}"))
    pause = np.zeros(SAMPLE_RATE // 2, np.float32)
    long = np.concatenate([part for wave in waves for part in (wave, pause)])
    rows.append(
        (
            f"real-time factor, one recording of {len(long) / SAMPLE_RATE:.0f} s",
            f"{_seconds(engine, long) * SAMPLE_RATE / len(long):.4f}",
        )
    )
    rows.append(("peak memory", f"{peak_memory_mib():.0f} MiB"))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, value in rows:
        print(f"{name:<48} {value}")


def _seconds(engine, wave: np.ndarray) -> float:
    start = time.perf_counter()
    engine.transcribe(wave)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
