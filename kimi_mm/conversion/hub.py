"""Where a checkpoint is: a folder here, or a repository of the Hugging Face hub that is downloaded first.

    owner/name ─► snapshot_download, PATTERNS only ─► blobs, named by their checksums ─► each new one is compared

Only weights, configs and vocabularies are fetched, never Python files: nothing that a repository holds is run.
`HF_ENDPOINT`, `HF_HOME` and the other settings of huggingface_hub hold. A connection that breaks is taken up where it
broke; a command that was stopped goes on behind the last whole file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from kimi_mm.conversion.layouts import GLM
from kimi_mm.errors import CheckpointError

GLM_REPOSITORY = "THUDM/glm-4-voice-tokenizer"
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.yaml", "*.md", "**/model.pt"]
VERIFIED = "kimi-mm-verified.json"  # in a repository's cache: blobs that were compared before
_BLOCK = 2**20


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
    """Returns the folder of a checkpoint, downloaded and compared with its checksums when it is a repository.

    Raises:
        CheckpointError: there is no such folder or repository, the download failed, or a file is not what it should be.
    """
    if Path(source).is_dir():
        return Path(source)
    if not is_repository(source):
        raise CheckpointError(f"'{source}' is neither a folder nor a repository of the form owner/name.")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(source), allow_patterns=PATTERNS))
    except Exception as error:  # beside its own, errors of whichever HTTP library this version of it uses
        lines = str(error).strip().splitlines()
        reason = (lines[0] if lines else type(error).__name__).rstrip(".")
        raise CheckpointError(
            f"'{source}' cannot be downloaded ({reason}); what is here already is kept, run the command again to go on."
        ) from None
    _compare(folder, str(source))
    return folder


def _compare(folder: Path, source: str) -> None:
    """Reads what was downloaded and not compared yet; a file that differs from its checksum is removed."""
    listed = folder.parents[1] / VERIFIED
    try:
        known = set(json.loads(listed.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = set()
    for file in sorted(path for path in folder.rglob("*") if path.is_symlink()):
        blob = file.resolve()
        if blob.name in known:
            continue
        if not _matches(blob):
            file.unlink()
            blob.unlink()
            raise CheckpointError(
                f"'{source}': {file.relative_to(folder)} differs from its checksum on the hub and was removed; "
                "run the command again to fetch it anew."
            )
        known.add(blob.name)
        aside = listed.with_name(f"{VERIFIED}.{os.getpid()}.tmp")
        aside.write_text(json.dumps(sorted(known)), encoding="utf-8")
        os.replace(aside, listed)


def _matches(blob: Path) -> bool:
    """Whether a blob is what its name says: SHA-256 of large files, git's SHA-1 of small ones; other names pass."""
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        digest = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
    else:
        return True
    with blob.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest() == blob.name
