"""The tower at published size against transformers' kimi_k25 with the same weights, in one process.

    python -m benchmarks.vision --device cuda --images 16 --side 1024
    python -m benchmarks.vision --layers 1 --side 224 --images 2 --dtype float32        a quick run on a CPU

Prints median and best milliseconds of both, their ratio, peak memory on a GPU, and the largest relative difference of
an item's rows. `--attention` forces one backend of torch's scaled_dot_product_attention for ours.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kimi_mm.vision.encoder import VisionEncoder
from kimi_mm.vision.key_maps import to_published
from kimi_mm.vision.presets import PRESETS
from kimi_mm.vision.processing import navit_size

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--side", type=int, nargs="+", default=[1024], help="pixels; several are taken in turn")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--attention", choices=["auto", *BACKENDS], default="auto")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)

    config = PRESETS["kimi_k25"]
    config = config.replace(tower=config.tower.replace(num_layers=arguments.layers), output_size=1024)
    torch.manual_seed(0)
    ours = VisionEncoder(config).to(device, dtype).eval()
    theirs = _theirs(ours).to(device, dtype).eval()
    grids = []
    for number in range(arguments.images):
        side = arguments.side[number % len(arguments.side)]
        _, padded = navit_size(side, side, config.input.max_patches, config)
        grids.append((1, padded[0] // 14, padded[1] // 14))
    grid_thw = torch.tensor(grids)
    pixels = torch.randn(int(grid_thw.prod(1).sum()), 3, 14, 14, device=device, dtype=dtype)
    backend = contextlib.nullcontext
    if arguments.attention != "auto":
        backend = lambda: sdpa_kernel(BACKENDS[arguments.attention])  # noqa: E731

    def run_ours() -> list[torch.Tensor]:
        with backend():
            return ours(pixels, grid_thw)

    def run_theirs() -> tuple[torch.Tensor, ...]:
        return theirs.get_image_features(pixels, grid_thw.to(device)).pooler_output

    with torch.inference_mode():
        pairs = zip(run_ours(), run_theirs(), strict=True)
        difference = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
        fast, slow = (_time(run, device, arguments.repeats) for run in (run_ours, run_theirs))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}, {arguments.dtype}, {arguments.layers} layers, {len(pixels)} patches")
    print(f"ours   {fast[0]:9.1f} median {fast[1]:9.1f} best ms{_peak(fast[2])}   attention {arguments.attention}")
    print(f"theirs {slow[0]:9.1f} median {slow[1]:9.1f} best ms{_peak(slow[2])}")
    print(f"ratio of medians {slow[0] / fast[0]:.2f}, largest relative difference of an item {difference:.1e}")


def _theirs(ours: VisionEncoder) -> torch.nn.Module:
    """transformers' model with a stub of a text part, carrying our weights through its own published names."""
    import tempfile

    from safetensors.torch import save_file
    from transformers import Kimi_K25Config, Kimi_K25Model

    tower = ours.config.tower
    text = {
        "model_type": "deepseek_v3",
        "vocab_size": 8,
        "hidden_size": ours.config.output_size,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "first_k_dense_replace": 1,
    }
    config = Kimi_K25Config(
        text_config=text, vision_config={"num_hidden_layers": tower.num_layers}, image_token_id=1, video_token_id=2
    )
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = ["Kimi_K25Model"]
        config.save_pretrained(folder)
        state = {name: tensor.float().cpu().contiguous() for name, tensor in to_published(ours.state_dict()).items()}
        save_file(state, f"{folder}/model.safetensors", metadata={"format": "pt"})
        return Kimi_K25Model.from_pretrained(folder, attn_implementation="sdpa")


def _time(run: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float, float | None]:
    """Median and best milliseconds, and the peak of allocated GiB on a GPU."""
    taken = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append((time.perf_counter() - start) * 1e3)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return statistics.median(taken[2:]), min(taken[2:]), peak


def _peak(gibibytes: float | None) -> str:
    return "" if gibibytes is None else f", peak {gibibytes:.2f} GiB"


if __name__ == "__main__":
    main()
