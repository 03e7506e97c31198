"""From a recipe to a trained checkpoint: builds the parts, trains, and writes `RUN/model`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from kimi_mm.audio.encoder import AudioEncoder
from kimi_mm.checkpoint import load_tensors, save_checkpoint
from kimi_mm.config import ConfigError, ModelConfig
from kimi_mm.conversion.tuning import PublishedStart, published_start, widen
from kimi_mm.data.art import Art
from kimi_mm.data.debug import (
    write_debug_art,
    write_debug_chat,
    write_debug_data,
    write_debug_dialogs,
    write_debug_documents,
    write_debug_targets,
    write_debug_turns,
)
from kimi_mm.data.loader import SpeechLoader, TextLoader, training_texts
from kimi_mm.data.manifest import write_aside
from kimi_mm.data.programs.samples import write_samples
from kimi_mm.data.scene_loader import SceneLoader
from kimi_mm.data.spoken_loader import SpokenLoader
from kimi_mm.data.target_loader import TargetLoader
from kimi_mm.errors import CheckpointError
from kimi_mm.model import Model
from kimi_mm.processing import Processor
from kimi_mm.processing_published import processor_for
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.document_objective import DocumentObjective
from kimi_mm.training.documents import hear_all, open_documents, with_files
from kimi_mm.training.freezing import merge_lora
from kimi_mm.training.joint_objective import JointObjective
from kimi_mm.training.objectives import build_objective
from kimi_mm.training.recipe import DOCUMENTS, MIXED, SPEECH_OUT, Recipe, load_recipe
from kimi_mm.training.speech_out import build_speech_out
from kimi_mm.training.spoken_objective import SpokenObjective
from kimi_mm.training.vision_objective import VisionObjective

log = logging.getLogger(__name__)


def train(
    recipe: str,
    *,
    debug: bool = False,
    output: Path,
    resume: bool = True,
    overrides: list[str] | None = None,
    data: Sequence[str | Path] = (),
    model: str | Path = "",
) -> dict[str, float]:
    """Trains a recipe and writes the model to `output/model`.

    One that started from a published model is written in the converted layout, see `kimi_mm.conversion.tuning`.

    Args:
        recipe: name or path, see `load_recipe`.
        debug: run the recipe's debug size.
        output: run folder; an interrupted run there is continued when `resume`.
        overrides: "key=value" changes to the recipe.
        data: `.jsonl` and `.tar` files that take the place of `data.sources`.
        model: name, folder or repository to start from, in the place of what the recipe says.

    Returns:
        The last logged losses.

    Raises:
        ConfigError, CheckpointError: before any training, when the recipe, its data or its starting weights cannot
            be used.
    """
    from kimi_mm.training.parallel import from_main, join_processes, own_device
    from kimi_mm.training.trainer import Trainer

    join_processes()
    if model:
        overrides = [f"init={json.dumps(str(model))}", "model=", *(overrides or [])]
    settings, config = load_recipe(recipe, debug=debug, overrides=overrides)
    output = Path(output)
    if data:
        settings = with_files(settings, data)
    if debug:
        settings = from_main(lambda: _with_debug_data(settings, output / "data"))
    start = None
    if settings.init and settings.stage in DOCUMENTS:
        start = published_start(settings.init, settings.audio_tokenizer or None)
    config = config if start is None else start.config
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    if start is None:
        tokenizer = TextTokenizer.from_json(from_main(lambda: _text_tokenizer(settings, config).to_json()))
    else:
        tokenizer = start.tokenizer()
    processor = processor_for(config, tokenizer)
    documents = None
    if settings.stage in DOCUMENTS:
        documents = open_documents(settings, config, processor, output)
    net = _model(settings, config, start)
    if settings.init_audio:
        load_tensors(net.audio, Path(settings.init_audio), prefix="audio.")
    if settings.init_vocoder and net.detokenizer is not None:
        load_tensors(net.detokenizer.vocoder, Path(settings.init_vocoder), prefix="detokenizer.vocoder.")
    teacher = _teacher(settings, config)
    if teacher is not None and not settings.init:
        net.audio.encoder.load_state_dict(teacher.state_dict())
    speech = _speech(settings, processor)
    heard = speech.shards.utterances if isinstance(speech, SpeechLoader) else []
    if settings.stage in MIXED and not all(item.text for item in heard):
        folders = ", ".join(settings.speech.folders)
        raise CheckpointError(f"{folders}: holds speech without transcripts; the {settings.stage} stage needs text.")
    needs_text = settings.stage == "text" or (settings.stage in MIXED and settings.text_share > 0)
    text = TextLoader(settings.text, processor, settings.seed) if needs_text else None
    draws = settings.stage == "vision" or settings.scene_share > 0
    scenes = SceneLoader(settings.scenes, processor, settings.seed) if draws else None
    if settings.stage in SPEECH_OUT:
        objective = build_speech_out(net, settings)
    elif settings.stage in DOCUMENTS:
        objective = DocumentObjective(net, settings)
        widen(net)
    elif settings.stage == "vision":
        objective = VisionObjective(net, settings)
    elif settings.stage == "speech":
        objective = SpokenObjective(net, settings)
    elif settings.stage == "joint":
        objective = JointObjective(net, settings)
    else:
        objective = build_objective(net, settings, teacher)
    net.to(own_device())
    if teacher is not None and not settings.init and isinstance(speech, SpeechLoader):
        _seed_codebook(net, speech)
    if documents is not None:
        hear_all(documents, settings, net, output)
    trainer = Trainer(settings, objective, speech, text, output, scenes, documents, _spoken(settings, processor))
    numbers = trainer.train(resume=resume)
    if settings.lora is not None:
        merge_lora(net.backbone)
    trained = trainer.whole_model(net)
    if trained is not None:
        if start is not None:
            start.write(output / "model", trained)
            size = sum(file.stat().st_size for file in (output / "model").glob("*.safetensors"))
        else:
            size = save_checkpoint(output / "model", trained, tokenizer, weights=settings.weights)
        reached = {"step": trainer.step, "finished": trainer.finished, "seconds": round(trainer.seconds, 1)}
        summary = json.dumps({**reached, **numbers}, indent=1) + "\n"
        write_aside(output / "summary.json", summary.encode())
        log.info("wrote %s (%.1f MiB)", output / "model", size / 2**20)
    from_main(lambda: None)  # no process leaves while the first still writes
    return numbers


def _model(recipe: Recipe, config: ModelConfig, start: PublishedStart | None) -> Model:
    """Builds the model with the weights that the recipe starts from."""
    if start is not None:
        # What stays as it is need not be wider than it was published; FSDP2 wants one type.
        alone = recipe.precision == "bf16" and not torch.distributed.is_initialized()
        return start.model(None if alone else torch.float32)
    model = Model(config)
    if recipe.init:
        # A voice, eyes, or a branch that speaks, may be given to a model that had none, or be left behind.
        speaks = ("detokenizer.", "backbone.audio.", "backbone.audio_head.")
        new = {"vision": ("vision.",), "speech": speaks, **dict.fromkeys(SPEECH_OUT, ("detokenizer.",))}
        new |= dict.fromkeys((*DOCUMENTS, "joint"), ("vision.", *speaks))
        left = load_tensors(model, Path(recipe.init), optional=new.get(recipe.stage, ()), spare=("vision.", *speaks))
        if left:
            log.info("%s: the model of this recipe has no %s, which are left out", recipe.init, ", ".join(left))
    return model


def _speech(recipe: Recipe, processor: Processor) -> SpeechLoader | TargetLoader | None:
    """Opens the loader that the stage's sound comes from."""
    if recipe.stage in ("text", *DOCUMENTS) or (recipe.stage in MIXED[1:] and not recipe.speech_share):
        return None
    if recipe.stage in SPEECH_OUT:
        return TargetLoader(recipe.target, recipe.seed)
    return SpeechLoader(recipe.speech, processor, recipe.seed)


def _spoken(recipe: Recipe, processor: Processor) -> dict[str, SpokenLoader]:
    """Opens the loaders of sentences and of dialogs, as far as the stages "speech" and "joint" have shares for them."""
    if recipe.stage not in ("speech", "joint"):
        return {}
    dialogs = 1 - recipe.text_share - recipe.speech_share - recipe.tts_share - recipe.scene_share > 1e-6
    wanted = {"sentences": False} if recipe.tts_share else {}
    wanted |= {"dialogs": True} if dialogs else {}
    return {name: SpokenLoader(recipe.spoken, processor, recipe.seed, dialogs=kind) for name, kind in wanted.items()}


def _with_debug_data(recipe: Recipe, folder: Path) -> Recipe:
    """Puts a made-up corpus in the place of data that the recipe's debug size calls "debug"."""
    speech, texts = write_debug_data(folder)
    if recipe.speech.folders == ("debug",):
        recipe = recipe.replace(speech=recipe.speech.replace(folders=(str(speech),)))
    if recipe.target.folders == ("debug",):
        recipe = recipe.replace(target=recipe.target.replace(folders=(str(write_debug_targets(folder)),)))
    if recipe.spoken.dialogs == ("debug",):
        spoken = recipe.spoken.replace(
            targets=(str(write_debug_targets(folder)),), dialogs=(str(write_debug_dialogs(folder)),)
        )
        recipe = recipe.replace(spoken=spoken)
    if recipe.text.path == "debug":
        recipe = recipe.replace(text=recipe.text.replace(path=str(texts)))
    if any(source.files == ("debug-programs",) for source in recipe.data.sources):
        write_samples(folder / "programs.jsonl", Art(write_debug_art(folder)), 12)
        recipe = with_files(recipe, [folder / "programs.jsonl"])
    for name, write in (("debug-turns", write_debug_turns), ("debug-chat", write_debug_chat)):
        if any(source.files == (name,) for source in recipe.data.sources):
            recipe = with_files(recipe, [write(folder)])
    if any(source.files == ("debug",) for source in recipe.data.sources):
        made = write_debug_documents(folder)
        sources = [
            source.replace(files=(str(made[source.layout]),)) if source.files == ("debug",) else source
            for source in recipe.data.sources
        ]
        recipe = recipe.replace(data=recipe.data.replace(sources=tuple(sources)))
    if recipe.scenes.art == "debug":
        recipe = recipe.replace(scenes=recipe.scenes.replace(art=str(write_debug_art(folder))))
    return recipe


def _text_tokenizer(recipe: Recipe, config: ModelConfig) -> TextTokenizer:
    """Takes the tokenizer of the starting checkpoint, the one the recipe names, or trains one on the recipe's text."""
    if recipe.init:
        return TextTokenizer.load(Path(recipe.init) / "tokenizer.json")
    if recipe.tokenizer:
        return TextTokenizer.load(recipe.tokenizer)
    if not recipe.text.path:
        raise ConfigError("text.path: needed to train a text tokenizer, since neither init nor tokenizer is given.")
    return TextTokenizer.train(training_texts(recipe.text.path), config.vocab.num_text_tokens)


def _teacher(recipe: Recipe, config: ModelConfig) -> AudioEncoder | None:
    """Loads the pretrained encoder that the tokenizer stage starts from and distils."""
    if recipe.stage != "tokenizer":
        return None
    full = config.audio.encoder.replace(causal_convolution=False, block_size=None)
    teacher = AudioEncoder(full, config.audio.mel.num_mel_bins)
    if recipe.whisper:
        try:
            teacher.load_state_dict({name: t.float() for name, t in load_file(recipe.whisper).items()})
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{recipe.whisper}: not the encoder that the model describes ({error}).") from None
    return teacher


def _seed_codebook(model: Model, speech: SpeechLoader) -> None:
    """Starts the codebook from vectors of the first batch rather than from noise."""
    device = next(model.parameters()).device
    batch = next(iter(speech))
    speech.load_state_dict({"epoch": 0, "cursor": 0})
    waves = batch.waves[: max(1, min(len(batch.waves), 64))].to(device).float() / 32768
    with torch.no_grad():
        vectors = model.audio.quantizer.project(model.audio.features_from_wave(waves))
    model.audio.quantizer.init_codebook(vectors.flatten(0, 1), torch.Generator().manual_seed(0))
