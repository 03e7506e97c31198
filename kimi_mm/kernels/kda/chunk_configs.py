"""Sizes of the chunk kernels of KDA: rows of a chunk, tiles, warps, pipeline stages. A benchmark may write into them.

    ROWS     device class -> operand bits -> padded K -> rows of a chunk, without and with a backward to come
    KERNELS  kernel -> operand bits -> padded K -> rows -> KT key and BV value channels of a tile, warps, stages, and
             the most registers of a thread (0: the compiler's choice; fewer let more programs share a processor)
    CONFIGS  both

A `scan` has one program per tile of BV value channels, head and sequence, which walks the chunks one after another:
BV decides how many there are. All other kernels have one per chunk and head.
"""

from __future__ import annotations

import functools

import torch

Leaf = dict[str, int]

HALF, SINGLE = 16, 32  # operand bits: bfloat16, and fp32 as three tf32 products

ROWS: dict[str, dict[int, dict[int, Leaf]]] = {
    "hopper": {
        HALF: {
            64: {"inference": 32, "training": 32},
            128: {"inference": 32, "training": 32},
            256: {"inference": 32, "training": 32},
        },
        SINGLE: {
            64: {"inference": 16, "training": 16},
            128: {"inference": 16, "training": 16},
            256: {"inference": 16, "training": 16},
        },
    },
    "ampere": {
        HALF: {
            64: {"inference": 32, "training": 32},
            128: {"inference": 32, "training": 32},
            256: {"inference": 16, "training": 16},
        },
        SINGLE: {
            64: {"inference": 16, "training": 16},
            128: {"inference": 16, "training": 16},
            256: {"inference": 16, "training": 16},
        },
    },
}

KERNELS: dict[str, dict[int, dict[int, dict[int, Leaf]]]] = {
    "inside": {
        HALF: {
            64: {
                16: {"KT": 64, "BV": 64, "num_warps": 1, "num_stages": 1, "maxnreg": 0},
                32: {"KT": 64, "BV": 64, "num_warps": 2, "num_stages": 1, "maxnreg": 0},
                64: {"KT": 64, "BV": 64, "num_warps": 8, "num_stages": 1, "maxnreg": 0},
            },
            128: {
                16: {"KT": 64, "BV": 64, "num_warps": 1, "num_stages": 1, "maxnreg": 0},
                32: {"KT": 64, "BV": 64, "num_warps": 2, "num_stages": 1, "maxnreg": 0},
                64: {"KT": 64, "BV": 64, "num_warps": 8, "num_stages": 1, "maxnreg": 0},
            },
            256: {
                16: {"KT": 64, "BV": 64, "num_warps": 1, "num_stages": 1, "maxnreg": 0},
                32: {"KT": 64, "BV": 64, "num_warps": 2, "num_stages": 1, "maxnreg": 0},
            },
        },
        SINGLE: {
            64: {16: {"KT": 32, "BV": 32, "num_warps": 4, "num_stages": 1, "maxnreg": 0}},
            128: {16: {"KT": 32, "BV": 32, "num_warps": 4, "num_stages": 1, "maxnreg": 0}},
            256: {16: {"KT": 32, "BV": 32, "num_warps": 4, "num_stages": 1, "maxnreg": 0}},
        },
    },
    "scan": {
        HALF: {
            64: {
                16: {"BV": 32, "num_warps": 4, "num_stages": 4},
                32: {"BV": 32, "num_warps": 4, "num_stages": 3},
                64: {"BV": 32, "num_warps": 4, "num_stages": 3},
            },
            128: {
                16: {"BV": 32, "num_warps": 4, "num_stages": 4},
                32: {"BV": 32, "num_warps": 4, "num_stages": 3},
                64: {"BV": 32, "num_warps": 4, "num_stages": 2},
            },
            256: {
                16: {"BV": 16, "num_warps": 8, "num_stages": 2},
                32: {"BV": 16, "num_warps": 8, "num_stages": 2},
            },
        },
        SINGLE: {
            64: {16: {"BV": 16, "num_warps": 4, "num_stages": 2}},
            128: {16: {"BV": 16, "num_warps": 8, "num_stages": 2}},
            256: {16: {"BV": 16, "num_warps": 8, "num_stages": 2}},
        },
    },
    "scan_back": {
        HALF: {
            64: {
                16: {"BV": 32, "num_warps": 4, "num_stages": 4},
                32: {"BV": 32, "num_warps": 4, "num_stages": 3},
                64: {"BV": 32, "num_warps": 4, "num_stages": 3},
            },
            128: {
                16: {"BV": 32, "num_warps": 4, "num_stages": 4},
                32: {"BV": 32, "num_warps": 4, "num_stages": 3},
                64: {"BV": 32, "num_warps": 4, "num_stages": 2},
            },
            256: {
                16: {"BV": 16, "num_warps": 8, "num_stages": 2},
                32: {"BV": 16, "num_warps": 8, "num_stages": 2},
            },
        },
        SINGLE: {
            64: {16: {"BV": 16, "num_warps": 4, "num_stages": 2}},
            128: {16: {"BV": 16, "num_warps": 8, "num_stages": 2}},
            256: {16: {"BV": 16, "num_warps": 8, "num_stages": 2}},
        },
    },
    "gradients": {
        HALF: {
            64: {
                16: {"KT": 32, "BV": 32, "num_warps": 2, "num_stages": 1, "maxnreg": 0},
                32: {"KT": 32, "BV": 32, "num_warps": 4, "num_stages": 1, "maxnreg": 0},
                64: {"KT": 32, "BV": 32, "num_warps": 8, "num_stages": 1, "maxnreg": 0},
            },
            128: {
                16: {"KT": 32, "BV": 32, "num_warps": 2, "num_stages": 1, "maxnreg": 0},
                32: {"KT": 32, "BV": 32, "num_warps": 4, "num_stages": 1, "maxnreg": 0},
                64: {"KT": 32, "BV": 32, "num_warps": 8, "num_stages": 1, "maxnreg": 0},
            },
            256: {
                16: {"KT": 32, "BV": 32, "num_warps": 2, "num_stages": 1, "maxnreg": 0},
                32: {"KT": 32, "BV": 32, "num_warps": 4, "num_stages": 1, "maxnreg": 0},
            },
        },
        SINGLE: {
            64: {16: {"KT": 32, "BV": 32, "num_warps": 4, "num_stages": 1, "maxnreg": 0}},
            128: {16: {"KT": 32, "BV": 32, "num_warps": 4, "num_stages": 1, "maxnreg": 0}},
            256: {16: {"KT": 32, "BV": 32, "num_warps": 4, "num_stages": 1, "maxnreg": 0}},
        },
    },
}

CONFIGS = {"rows": ROWS, "kernels": KERNELS}

# Parts that a sequence is cut into where its heads alone leave processors idle; None decides by the device.
PARTS: int | None = None
CHUNKS_PER_PART = 8  # a part pays for its summary from about so many chunks on
PARTS_FROM = 4  # fewer parts than this gain less than the summaries cost


def bits_of(dtype: torch.dtype) -> int:
    return SINGLE if dtype == torch.float32 else HALF


def rows_of_chunk(length: int, bits: int, BK: int, train: bool, device: torch.device) -> int:
    """Rows of a chunk: what the tables say, or less for short sequences."""
    most = ROWS[_device_class(device)][bits][max(64, BK)]["training" if train else "inference"]
    return min(most, 64 if length > 32 else 32 if length > 16 else 16)


def most_rows(bits: int, BK: int) -> int:
    """The largest chunk that all kernels have a configuration for."""
    return min(max(table[bits][max(64, BK)]) for table in KERNELS.values())


def tiles(kernel: str, bits: int, BK: int, VP: int, rows: int) -> Leaf:
    """Launch options of a kernel, its tiles cut to the channels there are."""
    table = KERNELS[kernel][bits][max(64, BK)]
    chosen = dict(table.get(rows) or table[max(table)])
    if not chosen.get("maxnreg", 1):
        del chosen["maxnreg"]
    chosen["BV"] = min(chosen["BV"], VP)
    if "KT" in chosen:
        chosen["KT"] = min(chosen["KT"], BK)
    return chosen


def parts_of_sequence(programs: int, chunks: int, device: torch.device) -> int:
    """Into how many parts to cut each sequence of about `chunks` chunks, given a scan's programs over whole ones."""
    if PARTS is not None:
        return PARTS
    parts = min(_processors(device) // programs, chunks // CHUNKS_PER_PART, 32)
    return parts if parts >= PARTS_FROM else 1


@functools.cache
def _device_class(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9:
        return "ampere"
    return "hopper"


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
