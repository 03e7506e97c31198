"""A training recipe: everything a run depends on, as one strict YAML file.

A recipe names a model (a file in `recipes/models`), the stage to train, its data, optimiser and length. Its `debug`
section holds replacements that shrink the run to seconds on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kimi_mm.audio.detokenizer_config import DetokenizerConfig
from kimi_mm.checkpoint import FORMATS, find_checkpoint
from kimi_mm.config import Config, ConfigError, ModelConfig
from kimi_mm.config_base import choice
from kimi_mm.data.augment import AugmentConfig
from kimi_mm.data.document_config import DocumentDataConfig
from kimi_mm.training.freezing import LoraConfig
from kimi_mm.training.guard import GuardConfig
from kimi_mm.training.parallel_config import ParallelConfig
from kimi_mm.training.speech_out_config import (
    FlowTrainingConfig,
    SpokenDataConfig,
    TargetDataConfig,
    VocoderTrainingConfig,
)
from kimi_mm.training.vision_config import SceneDataConfig

STAGES = ("tokenizer", "text", "asr", "vision", "detokenizer", "vocoder", "pretrain", "sft", "speech", "joint")
MIXED = ("asr", "vision", "speech", "joint")  # stages whose steps are dealt to sources by shares
DOCUMENTS = ("pretrain", "sft")  # stages on data that users bring
SPEECH_OUT = ("detokenizer", "vocoder")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Config):
    """Optimiser, and a schedule of warm-up, a flat part and a decay ("wsd"), or warm-up and a cosine.

    Args:
        optimizer: "adamw", or "muonclip": Muon for matrices, AdamW for the rest, QK-clip after each step.
        qk_clip: threshold of the attention logits under muonclip.
        momentum: of Muon.
    """

    optimizer: str = "adamw"
    momentum: float = 0.95
    qk_clip: float = 100.0
    lr: float = 1e-3
    encoder_lr_scale: float = 1.0  # multiplies the rate of the pretrained audio encoder
    vision_lr_scale: float = 1.0  # multiplies the rate of tower and projector
    betas: tuple[float, ...] = (0.9, 0.98)
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    warmup_steps: int = 200
    schedule: str = "wsd"
    decay_fraction: float = 0.3  # share of the steps that "wsd" spends decaying
    final_lr_scale: float = 0.02

    def __post_init__(self) -> None:
        if self.schedule not in ("wsd", "cosine"):
            raise ConfigError(f"schedule='{self.schedule}' must be wsd or cosine.")
        if self.optimizer not in ("adamw", "muonclip"):
            raise ConfigError(f"optimizer='{self.optimizer}' must be adamw or muonclip.")
        if self.qk_clip <= 0:
            raise ConfigError(f"qk_clip={self.qk_clip} must be positive.")


@dataclass(frozen=True, kw_only=True)
class SpeechDataConfig(Config):
    """Speech shards (see `kimi_mm.data.synthesis`) and how utterances are joined into batches of fixed shapes.

    Single utterances are short; a share `join_probability` of the examples joins several, with pauses, up to a
    length drawn from [4 s, `max_seconds`]. `weights` repeats a folder's utterances within an epoch.
    """

    folders: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    batch_seconds: float = 640.0
    buckets: tuple[float, ...] = (2.56, 3.84, 5.12, 7.68, 10.24, 15.36, 20.48, 25.6)
    max_seconds: float = 24.0
    join_probability: float = 0.5
    tokens_per_second: float = 7.0  # room for text in a batch; longer texts are dropped and counted


@dataclass(frozen=True, kw_only=True)
class TextDataConfig(Config):
    """Sentences (`texts.jsonl.gz`), packed into rows of `row_tokens` tokens.

    Args:
        path: of the sentences.
        row_tokens: of a row.
        batch_rows: rows of a batch.
        dialogs: written ones among the sentences (see `kimi_mm.data.dialogs`).
        drills: single questions of arithmetic and spelling among them (see `kimi_mm.data.drills`).
    """

    path: str = ""
    row_tokens: int = 256
    batch_rows: int = 64
    dialogs: int = 0
    drills: int = 0


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """One training run.

    Args:
        stage: "tokenizer" (encoder distillation and quantizer), "text" (language model), "asr" (speech to text),
            "vision" (questions about pictures), "detokenizer" (codes to mel by flow matching), "vocoder" (mel to wave),
            "pretrain" and "sft" (documents and conversations of the section `data`), "speech" (spoken answers), "joint"
            (speech, vision and asr at once).
        model: model file below `recipes/`, for instance "models/nano.yaml" ("": the model of `init`).
        detokenizer: file of the detokenizer that the model gets, below `recipes/` ("": what the model file says).
        init: checkpoint folder to start from, or the name of a shipped one ("" starts from random weights). "sft" and
            "pretrain" also start from published models: a folder as downloaded or converted, or a hub's "owner/name".
        audio_tokenizer: folder or repository of GLM-4-Voice's tokenizer, where `init` is Kimi-Audio as downloaded.
        init_audio: checkpoint folder whose audio tokenizer replaces that of `init`.
        init_vocoder: checkpoint folder whose vocoder replaces that of `init`.
        whisper: safetensors file of pretrained encoder weights, for the tokenizer stage.
        stop_after: leave after this step with everything saved (0: run to the end); a later run goes on from there.
        cuda_graphs: replay the backbone, or all of a stage of speech output, as CUDA graphs, one for each batch shape;
            on each GPU without accumulation.
        token_corruption: share of the written tokens that the asr stage replaces by random ones in its input.
        train_seconds: of training in all, over however many starts: the schedule, `augment_from` included, follows this
            clock where it is further than the steps, and the run ends when they are spent (0: steps alone count).
        text_share: share of the steps of the asr, vision, speech and joint stages that train on text alone.
        speech_share: share of the steps of the vision, speech and joint stages that train on speech recognition.
        tts_share: share of the steps of the speech and joint stages that read sentences out.
        scene_share: share of the steps of the joint stage that answer about pictures. What the shares leave answers in
            dialogs (speech, joint) or about pictures (vision).
        feature_noise: standard deviation of noise on the continuous features that are heard, as a share of their size.
        audio_weight: weight of the codes of spoken answers beside their text.
        answers_weight: weight of the answers about pictures; 0 leaves the backbone out of the vision stage's pictures.
        shown_weight: weight of what every row of a picture shows, in words, beside the answers about it.
        freeze_backbone: the vision stage trains tower and projector only, and leaves the rest bit for bit as it was.
        freeze: parts that the stages on documents leave as they are, see `kimi_mm.training.freezing.PARTS`; what makes
            codes always is.
        lora: the stages on documents train adapters in the backbone instead of its weights; null trains the weights.
        peak_tflops: dense bf16 peak of the device that MFU is a share of; 0 knows it for common GPUs by their names.
        weights: format of the model that is written at the end, "fp32", "fp16", "int8" or "int6".
    """

    stage: str
    model: str = ""
    detokenizer: str = ""
    init: str = ""
    audio_tokenizer: str = ""
    init_audio: str = ""
    init_vocoder: str = ""
    whisper: str = ""
    tokenizer: str = ""
    seed: int = 0
    steps: int = 1000
    precision: str = "bf16"
    cuda_graphs: bool = False
    gradient_accumulation: int = 1
    save_every: int = 500
    log_every: int = 20
    train_seconds: float = 0.0
    stop_after: int = 0
    time_limit_seconds: float = 0.0  # 0: none; otherwise the run saves and stops before it
    text_share: float = 0.15
    speech_share: float = 0.0
    tts_share: float = 0.0
    scene_share: float = 0.0
    audio_weight: float = 1.0
    answers_weight: float = 1.0
    shown_weight: float = 0.0
    freeze_backbone: bool = False
    freeze: tuple[str, ...] = ()
    lora: LoraConfig | None = None
    peak_tflops: float = 0.0
    weights: str = "fp16"
    ctc_weight: float = 0.3
    feature_dropout: float = 0.1
    feature_noise: float = 0.0
    token_corruption: float = 0.0
    label_smoothing: float = 0.05
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    speech: SpeechDataConfig = field(default_factory=SpeechDataConfig)
    text: TextDataConfig = field(default_factory=TextDataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    augment_from: float = 0.0  # share of the steps before augmentation starts, or the vocoder's discriminators join
    scenes: SceneDataConfig = field(default_factory=SceneDataConfig)
    data: DocumentDataConfig = field(default_factory=DocumentDataConfig)
    spoken: SpokenDataConfig = field(default_factory=SpokenDataConfig)
    target: TargetDataConfig = field(default_factory=TargetDataConfig)
    flow: FlowTrainingConfig = field(default_factory=FlowTrainingConfig)
    vocoder: VocoderTrainingConfig = field(default_factory=VocoderTrainingConfig)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ConfigError(f"stage='{self.stage}' must be one of {', '.join(STAGES)}.")
        if min(self.train_seconds, self.time_limit_seconds) < 0:
            raise ConfigError("train_seconds and time_limit_seconds must not be negative.")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must not be negative.")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision='{self.precision}' must be fp32 or bf16.")
        spread = self.parallel
        if self.cuda_graphs and (spread.data != "ddp" or max(spread.expert, spread.context) > 1):
            raise ConfigError("cuda_graphs: only with parallel.data=ddp, and with expert=1 and context=1; choose one.")
        choice("weights", self.weights, FORMATS)
        if self.freeze_backbone and (self.stage != "vision" or self.text_share or self.speech_share):
            raise ConfigError("freeze_backbone: for the vision stage with text_share and speech_share 0 only.")
        if min(self.answers_weight, self.shown_weight) < 0 or not (self.answers_weight or self.shown_weight):
            raise ConfigError("answers_weight and shown_weight must not be negative, and one of them above 0.")
        if self.text_share + self.speech_share + self.tts_share + self.scene_share > 1 + 1e-6:
            raise ConfigError("text_share, speech_share, tts_share and scene_share add up to more than 1.")
        if self.scene_share and self.stage != "joint":
            raise ConfigError(f"scene_share={self.scene_share}: for the joint stage only.")
        if self.freeze_backbone and self.optim.optimizer == "muonclip":
            raise ConfigError("freeze_backbone: QK-clip would change the backbone; choose optimizer adamw.")
        if (self.freeze or self.lora) and self.stage not in DOCUMENTS:
            raise ConfigError(f"freeze and lora are for the stages {' and '.join(DOCUMENTS)} only.")
        if (self.lora or {"trunk", "text", "speech"} & set(self.freeze)) and self.optim.optimizer == "muonclip":
            raise ConfigError("freeze, lora: QK-clip would change frozen attention weights; choose optimizer adamw.")
        if not self.model and not self.init:
            raise ConfigError("model: needed where there is no init whose model could be taken.")


def recipes_root() -> Path:
    """Returns the folder of recipes: inside an installed package, or at the root of a source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def load_recipe(name: str, *, debug: bool = False, overrides: list[str] | None = None) -> tuple[Recipe, ModelConfig]:
    """Reads a recipe and the model it names.

    Args:
        name: a path, or a name below the recipes folder such as "asr/nano".
        debug: apply the recipe's `debug` section.
        overrides: "key=value" with dotted keys; values are YAML ("optim.lr=1e-4").

    Raises:
        ConfigError: names the file and the key.
    """
    path = _find(name)
    values = _read(path)
    small = values.pop("debug", {})
    if debug:
        _merge(values, small)
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"override '{override}' must look like key=value.")
        nested: dict[str, Any] = {}
        at = nested
        *parents, last = key.split(".")
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = _number(yaml.safe_load(value)) if value else ""
        _merge(values, nested)
    recipe = Recipe.from_dict(values, where=str(path))
    if recipe.init:
        recipe = recipe.replace(init=str(find_checkpoint(recipe.init)))
    model = ModelConfig.from_yaml(_find(recipe.model)) if recipe.model else _model_of(recipe)
    if recipe.detokenizer:
        model = model.replace(detokenizer=DetokenizerConfig.from_yaml(_find(recipe.detokenizer)))
    return recipe, model


def _model_of(recipe: Recipe) -> ModelConfig:
    """The config of what a recipe starts from; a published model that is known by name is not downloaded for it."""
    from kimi_mm.conversion.hub import is_repository
    from kimi_mm.conversion.presets import PRESETS
    from kimi_mm.conversion.tuning import is_published, published_start

    path = Path(recipe.init) / "config.yaml"
    if recipe.stage not in DOCUMENTS and is_published(recipe.init):
        raise ConfigError(
            f"init: published models are trained by the stages {' and '.join(DOCUMENTS)} only, not '{recipe.stage}'."
        )
    if path.is_file():
        return ModelConfig.from_yaml(path)
    for preset in PRESETS.values():
        if is_repository(recipe.init) and recipe.init in preset.repositories:
            return preset.config
    start = published_start(recipe.init, recipe.audio_tokenizer or None)
    return ModelConfig.from_yaml(path) if start is None else start.config


def _find(name: str) -> Path:
    for candidate in (Path(name), recipes_root() / name, recipes_root() / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(str(p.relative_to(recipes_root()).with_suffix("")) for p in recipes_root().rglob("*.yaml"))
    raise ConfigError(f"recipe '{name}' not found. Known: {', '.join(known)}.")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys.")
    return values


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _number(value: Any) -> Any:
    """YAML 1.1 reads "1e-4" as text; people mean a number, also inside of {lr: 1e-4}."""
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
