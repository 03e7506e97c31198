"""What a run of an ablation is scored by, on the same held-out parts for every run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kimi_mm
from benchmarks.ablation_cases import Scale
from benchmarks.ablation_data import HELD_CAPTIONS, HELD_OUT, held_questions
from kimi_mm.checkpoint import load_checkpoint
from kimi_mm.data.document_config import DataSourceConfig, DocumentDataConfig
from kimi_mm.data.loader import TextLoader
from kimi_mm.evaluation.vision import Judge, answer_all, by_programs
from kimi_mm.processing import Processor
from kimi_mm.training.document_objective import DocumentObjective
from kimi_mm.training.documents import open_documents
from kimi_mm.training.objectives import TextObjective
from kimi_mm.training.recipe import Recipe, TextDataConfig
from kimi_mm.vision.processing import VisionProcessor

HIGHER_IS_BETTER = ("accuracy", "accuracy by programs")


def score(measure: str, checkpoint: Path, data: Path, scale: Scale) -> float:
    """Scores a checkpoint.

    Args:
        measure: "text loss" and "caption loss" (nats a token), "accuracy" and "accuracy by programs" (0 to 1).
        checkpoint: folder.
        data: that `benchmarks.ablation_data` filled.
        scale: how much is scored.
    """
    return _MEASURES[measure](checkpoint, data, scale)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def _text_loss(checkpoint: Path, data: Path, scale: Scale) -> float:
    model, tokenizer = load_checkpoint(checkpoint, _device())
    objective = TextObjective(model, Recipe(stage="text", model="-", label_smoothing=0.0)).eval()
    config = TextDataConfig(path=str(data / HELD_OUT), row_tokens=scale.row_tokens, batch_rows=scale.batch_rows)
    batches = iter(TextLoader(config, Processor(model.config.vocab, tokenizer), seed=0))
    losses = [objective(_moved(next(batches), _device()))["loss"] for _ in range(scale.held_out_batches)]
    return torch.stack(losses).mean().item()


@torch.no_grad()
def _caption_loss(checkpoint: Path, data: Path, scale: Scale) -> float:
    model, tokenizer = load_checkpoint(checkpoint, _device())
    assert model.config.vision is not None
    source = DataSourceConfig(files=(str(data / HELD_CAPTIONS),), layout="image_to_text")
    documents = DocumentDataConfig(sources=(source,), batch_positions=scale.positions)
    recipe = Recipe(stage="pretrain", model="-", label_smoothing=0.0, data=documents)
    processor = Processor(model.config.vocab, tokenizer, VisionProcessor(model.config.vision))
    batches = iter(open_documents(recipe, model.config, processor, checkpoint.parent / "held-out"))
    objective = DocumentObjective(model, recipe).eval()
    losses = [objective(next(batches).to(_device()))["loss"] for _ in range(scale.held_out_batches)]
    return torch.stack(losses).mean().item()


def _accuracy(checkpoint: Path, data: Path, scale: Scale) -> float:
    engine = kimi_mm.load(checkpoint, device=_device())
    return _share_right(lambda path, asked: engine.describe(path, asked, max_tokens=48), data)


def _accuracy_by_programs(checkpoint: Path, data: Path, scale: Scale) -> float:
    engine = kimi_mm.load(checkpoint, device=_device())
    return _share_right(lambda path, asked: by_programs(engine, path, asked), data)


def _share_right(describe: Callable[[Path, str], str], data: Path) -> float:
    judge, answers = Judge(), answer_all(describe, held_questions(data))
    return sum(judge.right(a.question, a.said) for a in answers) / len(answers)


_MEASURES: dict[str, Callable[[Path, Path, Scale], float]] = {
    "text loss": _text_loss,
    "caption loss": _caption_loss,
    "accuracy": _accuracy,
    "accuracy by programs": _accuracy_by_programs,
}


def _moved(batch: Any, device: str) -> Any:
    tensors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **{name: tensor.to(device) for name, tensor in tensors.items()})
