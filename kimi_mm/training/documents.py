"""From the section `data` of a recipe to a loader: every sample is checked first, and bad ones are named.

recipe.data ─► open_sources (laid out, heard, seen) ─┬─► RUN/bad-lines.jsonl and a report; an error, or left out
                                                     └─► DocumentLoader
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from kimi_mm.config import ConfigError
from kimi_mm.data.audio_cache import AudioCache
from kimi_mm.data.document_config import DataSourceConfig
from kimi_mm.data.document_loader import DocumentLoader
from kimi_mm.data.document_sources import open_sources
from kimi_mm.data.documents import DocumentMaker
from kimi_mm.errors import UserError
from kimi_mm.model import Model
from kimi_mm.processing import Processor
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


def open_documents(recipe: Recipe, model: Model, processor: Processor, run: Path) -> DocumentLoader:
    """Checks all data of a recipe and opens its loader.

    Args:
        recipe: of a stage on documents.
        model: whose tokenizer hears recordings.
        processor: of the model.
        run: folder of the run; gets `bad-lines.jsonl` where there are bad samples, and the cache.

    Raises:
        ConfigError: no files are named.
        UserError: a file cannot be opened, or samples cannot be used and `skip_bad` is off.
    """
    data = recipe.data
    if not any(source.files for source in data.sources):
        raise ConfigError("data.sources: name the files to train on, or give --data my.jsonl.")
    hear = AudioCache(Path(data.cache) if data.cache else run / "cache", model.audio.eval())
    maker = DocumentMaker(processor, hear, speaks=model.config.backbone.audio_head)
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
