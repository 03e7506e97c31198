"""Settings of the stage "vision", a section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from kimi_mm.config_base import Config, ConfigError

_KINDS = {"one": 0.2, "several": 0.14, "line": 0.12, "count": 0.14, "shapes": 0.12, "text": 0.18, "digit": 0.06}


@dataclass(frozen=True, kw_only=True)
class SceneDataConfig(Config):
    """Scenes drawn while training goes on (see `kimi_mm.data.scenes`), in batches of a few fixed shapes.

    A batch has pictures of several sizes and proportions, always the same ones for its bucket: `cells[i]` is the number
    of rows (28 x 28 pixels each) that the largest pictures of bucket i make, and `cell_shares[i]` its share of the
    batches. Every row is one picture and a conversation of `text_tokens` tokens at most about it.

    Args:
        art: pack of art (`kimi-mm prepare art`).
        batch_positions: positions of the backbone in a batch.
        grids: how many sizes a bucket mixes.
        kinds: how often each kind of scene is drawn, in any unit.
        questions: kinds of questions that are asked; () asks all.
        max_questions: of a conversation.
        processes: that draw; 0 draws in the trainer's own, -1 takes all cores but two (of this process's share).
    """

    art: str = "data/art/art.zip"
    batch_positions: int = 16384
    cells: tuple[int, ...] = (16, 42, 90, 169, 289)
    cell_shares: tuple[float, ...] = (0.2, 0.3, 0.28, 0.14, 0.08)
    grids: int = 8
    text_tokens: int = 96
    kinds: dict[str, float] = field(default_factory=lambda: {**_KINDS, "number": 0.04})
    questions: tuple[str, ...] = ()
    max_questions: int = 8
    processes: int = -1

    def __post_init__(self) -> None:
        if len(self.cells) != len(self.cell_shares) or not self.cells or min(self.cell_shares) < 0:
            raise ConfigError("cells and cell_shares must be lists of the same length, shares not below 0.")
        if list(self.cells) != sorted(set(self.cells)) or self.cells[0] < 4:
            raise ConfigError(f"cells={list(self.cells)} must grow, from 4 at least.")
        if sum(self.cell_shares) <= 0 or sum(self.kinds.values()) <= 0 or min(self.kinds.values()) < 0:
            raise ConfigError("cell_shares and kinds must have something above 0, and nothing below.")
        if min(self.batch_positions, self.grids, self.max_questions) < 1 or self.text_tokens < 24:
            raise ConfigError("batch_positions, grids and max_questions must be at least 1, text_tokens at least 24.")
