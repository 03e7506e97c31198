"""Codes and features of recordings, computed once and kept on disk: a frozen tokenizer hears a file only once.

    recording ─► SHA-256 of its bytes ─► FOLDER/TOKENIZER/ab/ab12....safetensors {codes int32 [N], features fp16 [N, F]}

Features always pass through fp16, so that the first epoch and a resumed run see the same numbers.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kimi_mm.audio.io import read_audio
from kimi_mm.audio.tokenizer import AudioTokenizer
from kimi_mm.data.rows import Source
from kimi_mm.processing import SAMPLES_PER_CODE, AudioClip


class AudioCache:
    """Callable from a recording to its `AudioClip`.

    Args:
        folder: where results are kept; made when the first one is written.
        tokenizer: frozen; its weights are part of the name under which results are kept.
        segments: clips also hold their recording, for a feature encoder that learns; the features kept are its first.
    """

    def __init__(self, folder: Path, tokenizer: AudioTokenizer, segments: bool = False) -> None:
        self.tokenizer, self.segments = tokenizer, segments
        self.folder = folder / _fingerprint(tokenizer)[:16]

    def __call__(self, source: Source) -> AudioClip:
        """Returns codes [N] and features [N, F] fp32; AudioError when the recording cannot be used."""
        data = source if isinstance(source, bytes) else source.read_bytes()
        name = hashlib.sha256(data).hexdigest()
        path = self.folder / name[:2] / f"{name}.safetensors"
        try:
            found = load_file(path)
        except (OSError, SafetensorError):
            found = self._hear(source, path)
        segments = self.tokenizer.segments(read_audio(source)[0]) if self.segments else None
        return AudioClip(found["codes"].long(), found["features"].float(), segments)

    def _hear(self, source: Source, path: Path) -> dict[str, torch.Tensor]:
        tokens = self.tokenizer.encode(read_audio(source)[0])
        # Out of inference mode: the results become inputs of a graph.
        codes, features = (torch.from_numpy(t.cpu().numpy().copy()) for t in (tokens.codes, tokens.features))
        found = {"codes": codes.int(), "features": features.half()}
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        save_file(found, aside)
        os.replace(aside, path)
        return found


def measure(source: Source) -> AudioClip:
    """Stands for hearing a recording where only its length counts: as many codes, all 0, and no features to speak of.

    Raises:
        AudioError: when the recording cannot be used.
    """
    count = -(-len(read_audio(source)[0]) // SAMPLES_PER_CODE)
    return AudioClip(torch.zeros(count, dtype=torch.int64), torch.zeros(count, 0))


def _fingerprint(tokenizer: AudioTokenizer) -> str:
    digest = hashlib.sha256(tokenizer.config.to_yaml().encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
