"""What GPUs do at most: dense bf16 products, memory, and links; from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One kind of GPU.

    Args:
        flops: dense bf16 FLOP/s. memory: bytes. bandwidth: of the memory, bytes/s.
        link: bytes/s in one direction to GPUs of the same host; network: to other hosts, a GPU's share.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float = 50e9  # 400 Gbit/s


DEVICES = {
    "A100": Device("A100", 312e12, 80e9, 2.04e12, 300e9, 25e9),
    "H100": Device("H100", 989e12, 80e9, 3.35e12, 450e9),
    "H200": Device("H200", 989e12, 141e9, 4.8e12, 450e9),
    "H20": Device("H20", 148e12, 96e9, 4.0e12, 450e9),
    "B200": Device("B200", 2250e12, 180e9, 8.0e12, 900e9),
    "L40S": Device("L40S", 362e12, 48e9, 0.864e12, 32e9, 25e9),
    "RTX 4090": Device("RTX 4090", 165e12, 24e9, 1.01e12, 32e9, 12.5e9),
}


def known_device(name: str) -> Device | None:
    """Returns the device whose name is part of `name`, as torch reports it ("NVIDIA H100 80GB HBM3"), or None."""
    matches = [device for key, device in DEVICES.items() if key.lower() in name.lower()]
    return max(matches, key=lambda device: len(device.name)) if matches else None
