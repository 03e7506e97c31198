"""Batches of documents, packed into one row or padded in buckets, in an order that a checkpoint can restore.

    sources ─► draw by weight ─► pool of documents (numbers and lengths only) ─► pack ─► rows ─► read ─► DocumentBatch

Which source comes next is the one that has got the fewest positions for its weight, so that every stretch of a run has
the same mixture. Lengths are known from the check before training; media are read when a row is made. The state of the
loader is a few lists of integers, and a resumed run sees exactly the batches of one never interrupted.

Shapes: B rows, T positions, L labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kimi_mm.data.document_config import DataSourceConfig
from kimi_mm.data.documents import GROUPS, Document, DocumentMaker
from kimi_mm.data.loader import NOT_MINE
from kimi_mm.data.packing import best_fit, bucket
from kimi_mm.data.rows import Rows
from kimi_mm.errors import UserError
from kimi_mm.processing import IGNORE, ModelInputs, Processor, Streams, move


@dataclass
class DocumentBatch:
    """Documents and what to learn from them.

    `labels` [L] are the text ids to predict, `positions` [L] where, counted over the flattened rows. They lie group by
    group in the order of `group_names`; `label_counts` says how many each group has, on the host, so that nobody has to
    ask the device. `audio_labels` [A] are the ids of the audio stream to predict at `audio_positions` [A]. `used`
    positions are no padding; `documents` is how many there are.
    """

    inputs: ModelInputs
    positions: torch.Tensor
    labels: torch.Tensor
    audio_positions: torch.Tensor
    audio_labels: torch.Tensor
    group_names: tuple[str, ...]
    label_counts: tuple[int, ...]
    used: int
    documents: int

    def to(self, device: torch.device | str) -> DocumentBatch:
        """Moves all tensors to a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        moved = {name: move(tensor, device) for name, tensor in tensors.items()}
        return replace(self, inputs=self.inputs.to(device), **moved)


@dataclass(frozen=True)
class DocumentSource:
    """Good documents of one source: which row of which file each is, its positions, and its group."""

    config: DataSourceConfig
    files: tuple[Rows, ...]
    index: np.ndarray  # [documents, 2] file, row
    lengths: np.ndarray  # [documents]
    groups: tuple[str, ...]

    @property
    def sees(self) -> bool:
        """Whether any document has a picture or clip."""
        return bool({"image", "video", "mixed"} & set(self.groups))


class DocumentLoader:
    """Endless iterator of `DocumentBatch`.

    Args:
        sources: where documents come from, with weights.
        maker: reads them.
        batch_positions: positions of a batch; less when all documents together are fewer.
        pack, look_ahead, vision_share: see `DocumentDataConfig`.
        seed: of the order.

    Raises:
        UserError: no documents, or a share for pictures of which there are none.
    """

    def __init__(
        self,
        sources: Sequence[DocumentSource],
        maker: DocumentMaker,
        *,
        batch_positions: int,
        pack: bool = True,
        look_ahead: int = 512,
        vision_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.sources = [source for source in sources if len(source.index)]
        if not self.sources:
            raise UserError("data.sources: there is not a single sample to train on.")
        self.maker, self.pack, self.look_ahead, self.seed = maker, pack, look_ahead, seed
        self.group, self.groups = (
            0,
            1,
        )  # of every `groups` batches number `group` is made, NOT_MINE stands for the others
        longest = max(int(source.lengths.max()) for source in self.sources)
        total = sum(int(source.lengths.sum()) for source in self.sources)
        self.capacity = min(batch_positions, max(longest, total))
        self.weights = _weights(self.sources, vision_share)
        self.names = tuple(dict.fromkeys([*(s.config.name for s in self.sources if s.config.name), *GROUPS]))
        self._drawn = [0] * len(self.sources)  # documents of each source
        self._positions = [0] * len(self.sources)
        self._left: list[list[int]] = []  # [source, document] that the last pool left over
        self._ready: list[list[list[int]]] = []  # rows of [source, document], the next one last
        self._pools = 0
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # source to the epoch in progress and its order

    def state_dict(self) -> dict[str, Any]:
        """Returns the place as plain lists of integers."""
        return {
            "drawn": list(self._drawn),
            "positions": list(self._positions),
            "left": [list(pair) for pair in self._left],
            "ready": [[list(pair) for pair in row] for row in self._ready],
            "pools": self._pools,
            "documents": [len(source.index) for source in self.sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; UserError when the data is not what it was then."""
        if state["documents"] != [len(source.index) for source in self.sources]:
            raise UserError("data.sources: the files have changed since this run began; start anew with --no-resume.")
        self._drawn, self._positions = list(state["drawn"]), list(state["positions"])
        self._left = [list(pair) for pair in state["left"]]
        self._ready = [[list(pair) for pair in row] for row in state["ready"]]
        self._pools = state["pools"]

    def __iter__(self) -> Iterator[DocumentBatch]:
        for number in itertools.cycle(range(self.groups)):
            row = self.next_row()
            if number != self.group:
                yield NOT_MINE
                continue
            documents = [self._read(source, number) for source, number in row]
            named = [self.sources[source].config.name for source, _ in row]
            yield collate(documents, self.maker.processor, self.pack, self.names, named)

    def next_row(self) -> list[list[int]]:
        """Returns the [source, document] pairs of the next batch and moves on."""
        if not self._ready:
            self._fill()
        return self._ready.pop()

    def length(self, source: int, document: int) -> int:
        """Returns the positions of a document."""
        return int(self.sources[source].lengths[document])

    def _read(self, source: int, number: int) -> Document:
        chosen = self.sources[source]
        file, row = chosen.index[number].tolist()
        return self.maker.make(chosen.files[file][row], chosen.config.layout)

    def _fill(self) -> None:
        """Packs the next pool of documents."""
        pool = self._left
        total = sum(self.length(*pair) for pair in pool)
        # Several rows at least, or packing would have nothing to choose from; but a few documents are not repeated.
        most = sum(len(source.index) for source in self.sources)
        while len(pool) < most and (len(pool) < self.look_ahead or total < 4 * self.capacity):
            pool.append(self._draw())
            total += self.length(*pool[-1])
        lengths = [self.length(*pair) for pair in pool]
        groups = (best_fit if self.pack else bucket)(lengths, self.capacity)
        rows = [[pool[i] for i in group] for group in groups]
        emptiest = min(range(len(rows)), key=lambda i: sum(self.length(*pair) for pair in rows[i]))
        self._left = rows.pop(emptiest) if len(rows) > 1 else []
        order = np.random.default_rng((self.seed, 2, self._pools)).permutation(len(rows))
        self._ready = [rows[i] for i in order]
        self._pools += 1

    def _draw(self) -> list[int]:
        source = min(range(len(self.sources)), key=lambda s: self._positions[s] / self.weights[s])
        epoch, at = divmod(self._drawn[source], len(self.sources[source].index))
        document = int(self._order(source, epoch)[at])
        self._drawn[source] += 1
        self._positions[source] += self.length(source, document)
        return [source, document]

    def _order(self, source: int, epoch: int) -> np.ndarray:
        if source not in self._orders or self._orders[source][0] != epoch:
            rng = np.random.default_rng((self.seed, 1, source, epoch))
            self._orders[source] = (epoch, rng.permutation(len(self.sources[source].index)))
        return self._orders[source][1]


def collate(
    documents: Sequence[Document],
    processor: Processor,
    pack: bool,
    names: tuple[str, ...] = GROUPS,
    named: Sequence[str] | None = None,
) -> DocumentBatch:
    """Joins documents into a batch.

    Args:
        documents: one at least.
        processor: of the model.
        pack: one row with `cu_seqlens`; otherwise one row a document, padded on the right.
        names: names of groups.
        named: for each document the group that its labels count for; "" takes the document's own.
    """
    rows = [document.streams for document in documents]
    if pack:
        joined = Streams()
        for row in rows:
            joined.extend(row)
        everything = [[clip for d in documents for clip in d.clips]], [[item for d in documents for item in d.items]]
        inputs = processor.collate([joined], *everything)
        bounds = np.cumsum([0, *(len(row) for row in rows)])
        inputs.cu_seqlens = torch.from_numpy(bounds).int()
    else:
        inputs = processor.collate(rows, [d.clips for d in documents], [d.items for d in documents])
    lengths = [len(row) for row in rows]
    groups = [names.index((named[i] if named else "") or documents[i].group) for i in range(len(rows))]
    if pack:
        group_at = np.repeat(groups, lengths)
    else:
        group_at = np.repeat(groups, inputs.text_ids.shape[1])
    (positions, labels), audio = (_labelled(labels) for labels in (inputs.text_labels, inputs.audio_labels))
    inputs.text_labels = inputs.audio_labels = None
    label_groups = torch.from_numpy(group_at)[positions]
    counts = tuple(torch.bincount(label_groups, minlength=len(names)).tolist())
    order = label_groups.argsort(stable=True)
    return DocumentBatch(
        inputs, positions[order], labels[order], *audio, names, counts, used=sum(lengths), documents=len(rows)
    )


def _labelled(labels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [B, T] to the flat positions that have one, and those labels."""
    assert labels is not None
    flat = labels.flatten()
    where = (flat != IGNORE).nonzero()[:, 0]
    return where, flat[where]


def _weights(sources: Sequence[DocumentSource], vision_share: float) -> list[float]:
    weights = [source.config.weight for source in sources]
    if not vision_share:
        return weights
    seeing = sum(w for w, source in zip(weights, sources, strict=True) if source.sees)
    blind = sum(weights) - seeing
    if not seeing or not blind:
        raise UserError(f"data.vision_share={vision_share}: needs sources with pictures and sources without.")
    return [
        w * (vision_share / seeing if source.sees else (1 - vision_share) / blind)
        for w, source in zip(weights, sources, strict=True)
    ]
