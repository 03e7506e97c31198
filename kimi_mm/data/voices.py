"""The synthetic voices: a neural one with morphs, and diphone, clustergen and formant voices for robustness.

| engine | names                                  | used for                                             |
|--------|----------------------------------------|------------------------------------------------------|
| hibari | hibari-heart                           | training; the one clean voice for speech output      |
| hibari | hibari-morph                           | training; pitch, vocal tract and liveliness at random |
| flite  | flite-rms, flite-slt, flite-kal16      | training                                             |
| espeak | espeak-en-us, espeak-en-gb, variants   | training                                             |
| flite  | flite-morph                            | training; any of the three, vocal tract at random    |
| espeak | espeak-morph                           | training; accent, variant and vocal tract at random  |
| both   | flite-awb, espeak-en-gb-scotland       | test only (`UNSEEN`), refused in training plans      |

The morphs of flite and espeak play a voice at another sample rate, which scales its formants as a longer or shorter
vocal tract does; pace and pitch are set so that they end up in a natural range. Each utterance draws pitch, pace and
the rest from a generator seeded by (seed, sentence, voice). The names mean voices of synthesisers, not people.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kimi_mm.errors import UserError

# espeak-ng ignores a variant after "en-gb" (an alias of "en"), so the British ones are of "en-gb-x-rp".
ESPEAK_VARIANTS = ("en-us", "en-us+f2", "en-us+f3", "en-us+f4", "en-us+m2", "en-us+m3", "en-us+m4", "en-us+m7")
ESPEAK_VARIANTS += ("en-gb", "en-gb-x-rp+f2", "en-gb-x-rp+m7", "en-us+croak")
ESPEAK_ACCENTS = ("en-us", "en-us-nyc", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
_TIMBRES = """
    Alex Alicia Andrea Andy Annie AnxiousAndy Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario Michael Mike
    Nguyen RicishayMax RicishayMax2 RicishayMax3 Storm Tweaky adam anika announcer antonio aunty belinda benjamin boris
    croak david ed edward edward2 f1 f2 f3 f4 f5 grandma grandpa gustave iven iven2 iven3 iven4 john kaukovalta
    klatt klatt2 klatt3 klatt4 klatt5 linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel miguel norbert pablo paul
    pedro quincy rob robert sandro shelby steph steph2 steph3 travis victor whisper whisperf zac
"""
ESPEAK_TIMBRES = tuple(_TIMBRES.split())
TRACT_SCALES = (0.86, 1.18)  # of the sample rate; 1.18 is a vocal tract 15 % shorter
FLITE_TRAINED = ("rms", "slt", "kal16")
ESPEAK_RATE = 22_050
UNSEEN = ("flite-awb", "espeak-en-gb-scotland")
# The mixture of the test set of seen voices; training adds the morphs.
SEEN_WEIGHTS: dict[str, float] = {
    "hibari-heart": 0.10,
    "hibari-morph": 0.70,
    "flite-rms": 0.06,
    "flite-slt": 0.06,
    "flite-kal16": 0.02,
    **{f"espeak-{variant}": 0.06 / len(ESPEAK_VARIANTS) for variant in ESPEAK_VARIANTS},
}
TRAINING_WEIGHTS: dict[str, float] = {
    "hibari-heart": 0.06,
    "hibari-morph": 0.42,
    "flite-rms": 0.05,
    "flite-slt": 0.05,
    "flite-kal16": 0.03,
    "flite-morph": 0.13,
    **{f"espeak-{variant}": 0.08 / len(ESPEAK_VARIANTS) for variant in ESPEAK_VARIANTS},
    "espeak-morph": 0.18,
}
VOICES = (*TRAINING_WEIGHTS, *UNSEEN)


def training_weights(names: Sequence[str], weights: Mapping[str, float] = TRAINING_WEIGHTS) -> dict[str, float]:
    """Returns the part of a mixture that is of some synthesisers ("hibari", "flite", "espeak") or voices of it.

    Raises:
        VoiceError: a name is neither.
    """
    engines = sorted({name.partition("-")[0] for name in weights})
    for name in names:
        if name not in engines and name not in weights:
            raise VoiceError(f"Unknown voice '{name}'; known are {', '.join(engines)}, or single ones of theirs.")
    return {voice: weight for voice, weight in weights.items() if {voice, voice.partition("-")[0]} & set(names)}


@dataclass(frozen=True)
class Speech:
    """What a voice returned: `wave` float32 [S] at `sample_rate`, and the settings drawn, as text."""

    wave: np.ndarray
    sample_rate: int
    settings: str


class VoiceError(UserError):
    """A voice that cannot be used here; says what to install or set."""


def make_voice(name: str, tools: str | Path | None = None) -> Callable[[str, np.random.Generator], Speech]:
    """Returns a function (text, generator) -> `Speech` for a voice of `VOICES`.

    Args:
        name: the voice.
        tools: root of unpacked packages with usr/bin and usr/lib (see `find_program`).

    Raises:
        VoiceError: when the voice is unknown or its program or package is not there.
    """
    engine, _, speaker = name.partition("-")
    if name not in VOICES:
        raise VoiceError(f"Unknown voice '{name}'; known are {', '.join(VOICES)}.")
    if engine == "hibari":
        return _Hibari(morph=speaker == "morph")
    if engine == "flite":
        return _Flite(speaker, tools)
    return _Espeak(speaker, tools)


def hibari_engine() -> tuple[Any, Any]:
    """Returns hibari's synthesiser and its module of signal processing, whose `synth` makes the wave.

    Raises:
        VoiceError: when the package is not installed.
    """
    try:
        from hibari import Hibari, dsp
    except ImportError:
        raise VoiceError(
            "The voices 'hibari-*' need the package hibari-tts; install kimi-mm[synthesis] or hibari-tts."
        ) from None
    return Hibari(threads=1), dsp


class _Hibari:
    """hibari's "heart", optionally morphed between its network and its source-filter synthesis."""

    def __init__(self, morph: bool) -> None:
        self.engine, self.dsp = hibari_engine()
        self.morph = morph

    def __call__(self, text: str, rng: np.random.Generator) -> Speech:
        speed = round(float(rng.uniform(0.8, 1.25)), 3)
        pitch, warp, liveliness = draw_morph(rng) if self.morph else (1.0, 1.0, 1.0)
        plain = self.dsp.synth

        def morphed(lh, th, ln, lr, phi, f0, noise):
            lh, th, ln, lr = (warp_axis(x, warp) for x in (lh, th, ln, lr))
            return plain(lh, th, ln, lr, phi, scale_pitch(f0, pitch, liveliness), noise)

        try:
            if self.morph:
                self.dsp.synth = morphed
            wave = self.engine(text, speed=speed, seed=int(rng.integers(2**31)))
        finally:
            self.dsp.synth = plain
        settings = f"speed={speed}" + (f",f0={pitch},warp={warp},exp={liveliness}" if self.morph else "")
        return Speech(wave, self.engine.sample_rate, settings)


def draw_morph(rng: np.random.Generator) -> tuple[float, float, float]:
    """Draws (pitch factor .48-1.3, vocal tract warp .80-1.14, expressiveness .7-1.4); low voices get long tracts."""
    pitch = float(np.exp(rng.uniform(np.log(0.48), np.log(1.3))))
    place = (np.log(pitch) - np.log(0.48)) / (np.log(1.3) - np.log(0.48))
    warp = float(np.clip(0.81 + 0.30 * place + rng.normal(0, 0.03), 0.80, 1.14))
    return round(pitch, 3), round(warp, 3), round(float(rng.uniform(0.7, 1.4)), 3)


def scale_pitch(f0: np.ndarray, factor: float, liveliness: float) -> np.ndarray:
    """Scales voiced pitch [F] in Hz by `factor` and its log-excursions from the mean by `liveliness`."""
    voiced = f0 > 40.0
    if not voiced.any():
        return f0
    logs = np.log(np.maximum(f0, 1.0))
    mean = logs[voiced].mean()
    # hibari treats pitch below 40 Hz as unvoiced and sums harmonics up to 11 kHz.
    scaled = np.clip(np.exp(mean + np.log(factor) + liveliness * (logs - mean)), 45.0, 700.0)
    return np.where(voiced, scaled, f0).astype(np.float32)


def warp_axis(x: np.ndarray, factor: float) -> np.ndarray:
    """Stretches the frequency axis of spectra [bins, F] linearly: bin k of the result is bin k / factor of x."""
    bins = x.shape[0]
    position = np.minimum(np.arange(bins, dtype=np.float32) / np.float32(factor), bins - 1)
    low = np.minimum(position.astype(np.int64), bins - 2)
    part = (position - low)[:, None].astype(np.float32)
    return np.ascontiguousarray(x[low] * (1 - part) + x[low + 1] * part)


class _Flite:
    """A voice of the program flite, with random pace and pitch."""

    MEAN_PITCH = {"rms": 103.0, "slt": 170.0, "kal16": 105.0, "awb": 120.0}  # noqa: RUF012

    def __init__(self, speaker: str, tools: str | Path | None) -> None:
        self.speaker = speaker
        self.program, self.environment = find_program("flite", "KIMI_MM_FLITE", tools)

    def __call__(self, text: str, rng: np.random.Generator) -> Speech:
        morph = self.speaker == "morph"
        speaker = str(rng.choice(FLITE_TRAINED)) if morph else self.speaker
        rate = _draw_rate(16_000, rng) if morph else 16_000
        scale = rate / 16_000
        spread = (0.75, 1.35) if morph else (0.88, 1.15)
        stretch = round(float(rng.uniform(0.85, 1.2)) * scale, 3)
        pitch = round(self.MEAN_PITCH[speaker] * float(rng.uniform(*spread)) / scale, 1)
        with tempfile.TemporaryDirectory(dir=_memory_dir()) as folder:
            path = Path(folder) / "speech.wav"
            command = [self.program, "-voice", speaker, "--setf", f"duration_stretch={stretch}"]
            # A leading space keeps flite from taking a single word for a file name.
            command += ["--setf", f"int_f0_target_mean={pitch}", "-t", f" {text}", "-o", str(path)]
            _run(command, self.environment)
            wave, _ = parse_wav(path.read_bytes())
        settings = f"stretch={stretch},f0={pitch}"
        return Speech(wave, rate, f"{speaker},{settings},rate={rate}" if morph else settings)


class _Espeak:
    """A voice of the program espeak-ng, with random pace and pitch."""

    def __init__(self, speaker: str, tools: str | Path | None) -> None:
        self.speaker = speaker
        self.program, self.environment = find_program("espeak-ng", "KIMI_MM_ESPEAK", tools)

    def __call__(self, text: str, rng: np.random.Generator) -> Speech:
        if self.speaker == "morph":
            return self._morph(text, rng)
        pace, pitch = int(rng.integers(130, 190)), int(rng.integers(30, 70))
        wave, rate = self._speak(self.speaker, text, pace, pitch)
        return Speech(wave, rate, f"wpm={pace},pitch={pitch}")

    def _morph(self, text: str, rng: np.random.Generator) -> Speech:
        speaker = f"{rng.choice(ESPEAK_ACCENTS)}+{rng.choice(ESPEAK_TIMBRES)}"
        rate = _draw_rate(ESPEAK_RATE, rng)
        pace, pitch = round(rng.integers(120, 200) * ESPEAK_RATE / rate), int(rng.integers(15, 85))
        gap = int(rng.choice([0, 0, 0, 1, 2, 4]))
        wave, _ = self._speak(speaker, text, pace, pitch, gap)
        return Speech(wave, rate, f"{speaker},wpm={pace},pitch={pitch},gap={gap},rate={rate}")

    def _speak(self, speaker: str, text: str, pace: int, pitch: int, gap: int = 0) -> tuple[np.ndarray, int]:
        """Speaks at `pace` words a minute, `pitch` from 0 to 99, with `gap` times 10 ms between words."""
        command = [self.program, "-v", speaker, "-s", str(pace), "-p", str(pitch)]
        command += [*(["-g", str(gap)] if gap else []), "--stdout", "--", text]
        return parse_wav(_run(command, self.environment))


def _draw_rate(rate: int, rng: np.random.Generator) -> int:
    """Draws a sample rate near `rate` Hz; a multiple of 400, so that resampling to 16 kHz stays cheap."""
    return 400 * round(rate * float(rng.uniform(*TRACT_SCALES)) / 400)


def find_program(name: str, variable: str, tools: str | Path | None) -> tuple[str, dict[str, str]]:
    """Finds a synthesiser's program and the environment that it needs.

    Looked for, in this order: the path in the environment variable, `tools`/usr/bin (packages unpacked there, their
    libraries beside them), the search path.

    Args:
        name: program name.
        variable: environment variable that may hold its path.
        tools: root of unpacked packages, or None.

    Returns:
        The program's path and the environment to run it in.

    Raises:
        VoiceError: when it is in none of these places.
    """
    environment = dict(os.environ)
    given = os.environ.get(variable)
    root = Path(tools) if tools else None
    if given is None and root is not None and (root / "usr" / "bin" / name).exists():
        given = str(root / "usr" / "bin" / name)
        libraries = [
            path for path in (root / "usr" / "lib", *(root / "usr" / "lib").glob("*-linux-gnu")) if path.is_dir()
        ]
        before = environment.get("LD_LIBRARY_PATH", "")
        environment["LD_LIBRARY_PATH"] = ":".join([*map(str, libraries), *([before] if before else [])])
        data = next((path for path in (root / "usr").glob("lib/**/espeak-ng-data") if path.is_dir()), None)
        if name == "espeak-ng" and data is not None:
            environment["ESPEAK_DATA_PATH"] = str(data.parent)
    program = given or shutil.which(name)
    if program is None or not os.access(program, os.X_OK):
        raise VoiceError(
            f"The program '{name}' was not found; install the Debian package '{name}', set {variable} to its path, "
            f"or give --tools a folder of unpacked packages."
        )
    return program, environment


def parse_wav(data: bytes) -> tuple[np.ndarray, int]:
    """Reads 16-bit mono WAV bytes, also those with a made-up length as programs write to a pipe.

    Returns:
        Samples [S] float32 in [-1, 1] and the rate in Hz.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise VoiceError("The synthesiser returned no WAV data.")
    at, rate = 12, 0
    while at + 8 <= len(data):
        tag, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if tag == b"fmt ":
            rate = int.from_bytes(data[at + 12 : at + 16], "little")
        if tag == b"data":
            body = data[at + 8 : at + 8 + size]
            return np.frombuffer(body[: len(body) // 2 * 2], "<i2").astype(np.float32) / 32768.0, rate
        at += 8 + size + size % 2
    raise VoiceError("The synthesiser's WAV data holds no samples.")


def _run(command: list[str], environment: dict[str, str]) -> bytes:
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise VoiceError(f"{command[0]}: could not be run ({error}).") from None
    if done.returncode:
        message = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
        raise VoiceError(f"{command[0]}: failed ({message[0]}).")
    return done.stdout


def _memory_dir() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
