"""Where a checkpoint is: a folder here, or a repository of the Hugging Face hub that is downloaded first.

Only weights, configs and vocabularies are fetched, never Python files: nothing that a repository holds is run.
"""

from __future__ import annotations

import re
from pathlib import Path

from kimi_mm.conversion.layouts import GLM
from kimi_mm.errors import CheckpointError

GLM_REPOSITORY = "THUDM/glm-4-voice-tokenizer"
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.yaml", "*.md", "**/model.pt"]


def resolve(source: str | Path, audio_tokenizer: str | Path | None = None) -> tuple[Path, Path | None]:
    """Finds a checkpoint and, when it is Kimi-Audio's, the audio tokenizer that goes with it.

    Args:
        source: folder or repository.
        audio_tokenizer: likewise; None takes the subfolder, or for a repository the published tokenizer.

    Returns:
        Folders of both; the second is None when it is the subfolder or not needed.

    Raises:
        CheckpointError: there is no such folder or repository, or the download failed.
    """
    folder = locate(source)
    if audio_tokenizer is not None:
        return folder, locate(audio_tokenizer)
    downloaded = not Path(source).is_dir()
    if downloaded and (folder / "audio_detokenizer").is_dir() and not (folder / GLM).is_dir():
        return folder, locate(GLM_REPOSITORY)
    return folder, None


def is_repository(source: str | Path) -> bool:
    """Tells whether a name looks like OWNER/NAME of the hub and is no folder here."""
    return not Path(source).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None


def locate(source: str | Path) -> Path:
    """Returns the folder of a checkpoint, downloaded when it is a repository; an interrupted download goes on."""
    if Path(source).is_dir():
        return Path(source)
    if not is_repository(source):
        raise CheckpointError(f"'{source}' is neither a folder nor a repository of the form owner/name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"'{source}' cannot be downloaded ({reason}).") from None
