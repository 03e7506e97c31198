"""What the stage "joint" minimises: everything at once, a batch of one kind a step.

pictures and conversations about them    VisionObjective
sentences read out, dialogs answered     SpokenObjective
recordings written down, text alone      SpeechTextObjective, which both of them stand on
"""

from __future__ import annotations

from kimi_mm.training.spoken_objective import SpokenObjective
from kimi_mm.training.vision_objective import VisionObjective


class JointObjective(VisionObjective, SpokenObjective):
    """A batch goes to the first class that knows its kind."""
