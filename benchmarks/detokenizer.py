"""How soon and how fast speech comes out: `python -m benchmarks.detokenizer --preset nano --streams 1 2 4 8`.

Random weights of a preset. Codes are pushed one by one into all streams at once, as a model would make them; what is
measured is the time from the push that completes the first chunk to its sound (p50, p90, p99 over rounds), and the
computing time of whole utterances over the duration of all their sound.

    python -m benchmarks.detokenizer --cpu-time    # where other programs run: processor seconds, of one thread
    python -m benchmarks.detokenizer --preset kimi-audio --device cuda --bf16 --graphs
    python -m benchmarks.detokenizer --preset kimi-audio --device cuda --bf16 --set first_chunk_codes=8
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import torch
import yaml

from kimi_mm.audio.detokenizer import Detokenizer
from kimi_mm.audio.detokenizer_config import DetokenizerConfig
from kimi_mm.audio.detokenizer_stream import advance
from kimi_mm.training.recipe import recipes_root


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description="Latency and real-time factor of a detokenizer with random weights.")
    parser.add_argument("--preset", default="nano", help="nano, kimi-audio, debug, or a YAML file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--streams", type=int, nargs="+", default=[1])
    parser.add_argument("--codes", type=int, default=125, help="length of an utterance; 12.5 codes a second")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="DiT and BigVGAN in bf16")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread, not the wall clock")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="streaming settings, such as steps=8")
    options = parser.parse_args()
    if options.cpu_time and options.device != "cpu":
        parser.error("--cpu-time: for the device cpu only.")
    if options.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if options.cpu_time else time.perf_counter
    detokenizer = build(options)
    print(
        f"{options.preset} on {_device_name(options.device)}, torch {torch.__version__}, {torch.get_num_threads()} "
        f"threads; {sum(p.numel() for p in detokenizer.parameters()) / 1e6:.1f} M parameters; "
        f"{detokenizer.config.streaming}"
    )
    print(f"{'streams':>8} {'first sound, ms: p50':>22} {'p90':>8} {'p99':>8} {'real-time factor':>18}")
    for count in options.streams:
        measure(detokenizer, count, options.codes, clock)
        rounds = [measure(detokenizer, count, options.codes, clock) for _ in range(options.rounds)]
        p50, p90, p99 = np.percentile([first * 1e3 for first, _ in rounds], (50, 90, 99))
        factor = float(np.median([total for _, total in rounds]))
        print(f"{count:>8} {p50:>22.1f} {p90:>8.1f} {p99:>8.1f} {factor:>18.4f}")


def build(options: argparse.Namespace) -> Detokenizer:
    """Makes the detokenizer that the options describe."""
    shipped = recipes_root() / "models" / "detokenizer" / f"{options.preset}.yaml"
    config = DetokenizerConfig.from_yaml(shipped if shipped.is_file() else options.preset)
    changes = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in options.set)}
    config = config.replace(streaming=config.streaming.replace(**changes))
    torch.manual_seed(0)
    with torch.device(options.device):
        detokenizer = Detokenizer(config).eval()
    detokenizer.to(options.device)
    if options.bf16:
        detokenizer.dit.bfloat16()
        if config.bigvgan is not None:
            detokenizer.vocoder.bfloat16()
    return detokenizer.use_cuda_graphs(options.graphs)


def measure(
    detokenizer: Detokenizer, count: int, codes: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Speaks `count` utterances at once; returns seconds to the first sound, and computing time over sound."""
    size = detokenizer.config.dit.codebook_size
    rows = torch.randint(0, size, (count, codes), generator=torch.Generator().manual_seed(count)).tolist()
    streams = [detokenizer.stream() for _ in rows]
    _wait(detokenizer)
    first, total, samples = 0.0, 0.0, 0
    for place in range(codes + 1):
        start = clock()
        pieces = [row[place : place + 1] for row in rows]
        waves = advance(streams, pieces, final=place == codes)
        if any(len(wave) for wave in waves):
            _wait(detokenizer)
        took = clock() - start
        total += took
        samples += sum(len(wave) for wave in waves)
        if samples and not first:
            first = took
    return first, total / (samples / detokenizer.sample_rate)


def _wait(detokenizer: Detokenizer) -> None:
    if detokenizer.device.type == "cuda":
        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()


if __name__ == "__main__":
    main()
