"""From the section `data` of a recipe to a loader: every sample is checked first, and bad ones are named.

recipe.data ─► open_sources (laid out, opened, measured) ─┬─► RUN/bad-lines.jsonl and a report; an error, or left out
                                                          └─► DocumentLoader ─► hear_all: codes and features on disk

Checking needs no weights: what a recording becomes follows from its length, and hearing comes after.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from kimi_mm.config import ConfigError, ModelConfig
from kimi_mm.data.audio_cache import AudioCache, measure
from kimi_mm.data.document_config import DataSourceConfig
from kimi_mm.data.document_loader import DocumentLoader
from kimi_mm.data.document_sources import open_sources
from kimi_mm.data.documents import DocumentMaker, Hear
from kimi_mm.data.rows import RowError, Source
from kimi_mm.errors import UserError
from kimi_mm.model import Model
from kimi_mm.processing import AudioClip, Processor
from kimi_mm.training.document_objective import learns_features
from kimi_mm.training.recipe import DOCUMENTS, Recipe

log = logging.getLogger(__name__)


def with_files(recipe: Recipe, files: Sequence[str | Path]) -> Recipe:
    """Puts files in the place of a recipe's sources; the layout is that of its first one.

    Raises:
        ConfigError: when the stage does not read such files.
    """
    if recipe.stage not in DOCUMENTS:
        raise ConfigError(f"--data: for recipes of the stages {' and '.join(DOCUMENTS)}, not '{recipe.stage}'.")
    layout = recipe.data.sources[0].layout if recipe.data.sources else "conversation"
    source = DataSourceConfig(files=tuple(str(file) for file in files), layout=layout)
    return recipe.replace(data=recipe.data.replace(sources=(source,)))


def open_documents(recipe: Recipe, config: ModelConfig, processor: Processor, run: Path) -> DocumentLoader:
    """Checks all data of a recipe and opens its loader, which `hear_all` must follow before the first batch.

    Args:
        recipe: of a stage on documents.
        config: of the model.
        processor: of the model.
        run: folder of the run; gets `bad-lines.jsonl` where there are bad samples.

    Raises:
        ConfigError: no files are named.
        UserError: a file cannot be opened, or samples cannot be used and `skip_bad` is off.
    """
    data = recipe.data
    if not any(source.files for source in data.sources):
        raise ConfigError("data.sources: name the files to train on, or give --data my.jsonl.")
    maker = DocumentMaker(
        processor, measure if config.hears else _deaf(config), speaks=config.hears and config.backbone.audio_head
    )
    sources, report = open_sources(data, maker)
    if report.problems:
        found = run / "bad-lines.jsonl"
        report.write(found)
        text = "\n".join(report.lines())
        if not data.skip_bad:
            raise UserError(f"{text}\nMend them, or train without them (data.skip_bad=true); all are in {found}.")
        log.warning("%s\nThey are left out; all are in %s.", text, found)
    return DocumentLoader(
        sources,
        maker,
        batch_positions=data.batch_positions,
        pack=data.pack,
        look_ahead=data.look_ahead,
        vision_share=data.vision_share,
        seed=recipe.seed,
    )


def hear_all(loader: DocumentLoader, recipe: Recipe, model: Model, run: Path) -> None:
    """Hears every recording once, on the device where the model is, so that batches only read what is kept.

    Of several processes each hears its share, and what it misses later when its turn comes.

    Args:
        loader: of `open_documents`.
        recipe: of the run.
        model: whose tokenizer hears.
        run: folder of the run, for the cache.
    """
    if not model.config.hears:
        return
    cache = Path(recipe.data.cache) if recipe.data.cache else run / "cache"
    loader.maker.hear = AudioCache(cache, model.audio.eval(), segments=learns_features(model.config, recipe))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for source in loader.sources:
        for number in range(rank, len(source.index), world):
            if source.groups[number] in ("audio", "mixed"):
                file, row = source.index[number].tolist()
                loader.maker.make(source.files[file][row], source.config.layout)


def _deaf(config: ModelConfig) -> Hear:
    def hear(_: Source) -> AudioClip:
        raise RowError(f"there is a recording, but model '{config.name}' does not hear", "take one that does")

    return hear
