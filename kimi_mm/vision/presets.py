"""Published eyes, and nano's, by name.

| name         | tower            | parameters of tower + projector | published as                               |
|--------------|------------------|---------------------------------|--------------------------------------------|
| kimi_k25     | MoonViT-3D       | 416,866,032 + 54,277,888        | Kimi K2.5, K2.6                            |
| kimi_vl      | MoonViT          | 416,866,032 + 30,679,808        | Kimi-VL-A3B                                |
| kimi_vl_2506 | MoonViT          | the same                        | Kimi-VL-A3B-Thinking-2506, 3.2 Mpx a photo |
| nano         | MoonViT-3D, tiny | 3,868,992 + 837,056             | this package                               |
"""

from __future__ import annotations

import difflib

from kimi_mm.config import ConfigError, VisionConfig, VisionInputConfig, VisionTowerConfig

PRESETS: dict[str, VisionConfig] = {
    "kimi_k25": VisionConfig(input=VisionInputConfig(alpha="drop")),
    "kimi_vl": VisionConfig(
        input=VisionInputConfig(alpha="drop", max_patches=4096),
        tower=VisionTowerConfig(max_frames=1),
        output_size=2048,
    ),
    "kimi_vl_2506": VisionConfig(
        input=VisionInputConfig(alpha="drop"), tower=VisionTowerConfig(max_frames=1), output_size=2048
    ),
    "nano": VisionConfig(
        input=VisionInputConfig(max_patches=1024, max_patches_per_frame=256, max_frames_per_video=64),
        tower=VisionTowerConfig(
            hidden_size=192, num_layers=8, num_heads=3, intermediate_size=768, position_height=32, position_width=32
        ),
        output_size=320,
    ),
}


def vision_preset(name: str) -> VisionConfig:
    """Returns a preset by name; ConfigError names the nearest one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(PRESETS)}."
        raise ConfigError(f"vision preset '{name}' is unknown; {hint}")
    return PRESETS[name]
