"""kimi_mm: speech, pictures and text through one shared backbone.

`kimi_mm.load("nano")` gives a model that transcribes; see README.md. Importing the package stays light: torch and
everything heavier are imported by the names below on first use.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["KimiMM", "ModelConfig", "__version__", "load"]

_LAZY = {"load": "kimi_mm.pipeline", "KimiMM": "kimi_mm.pipeline", "ModelConfig": "kimi_mm.config"}

if TYPE_CHECKING:
    from kimi_mm.config import ModelConfig
    from kimi_mm.pipeline import KimiMM, load


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kimi_mm' has no attribute '{name}'")


if "transformers.models.auto" in sys.modules and "torch" in sys.modules:
    # Whoever has transformers open already finds our models in its Auto classes; others import kimi_mm.hf.
    from kimi_mm import hf as hf
