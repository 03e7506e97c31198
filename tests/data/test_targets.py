"""Targets of speech output: pairs in step, rows of one length, an order that depends on the seed alone."""

from itertools import islice

import numpy as np
import pytest
import torch

from kimi_mm.data.loader import SpeechShards
from kimi_mm.data.resample import to_16k
from kimi_mm.data.synthesis import PlannedClip, synthesise
from kimi_mm.data.target_loader import TargetLoader
from kimi_mm.data.targets import CANONICAL, TARGETS, TargetClip, speak_target, write_target_shard
from kimi_mm.data.voices import VoiceError
from kimi_mm.errors import CheckpointError, UserError
from kimi_mm.training.speech_out_config import TargetDataConfig

SENTENCES = ["Please leave a message after the tone.", "She turned left at the old bridge.", "It rained all day."]


@pytest.fixture(scope="module")
def ramps(tmp_path_factory):
    """Twenty utterances of two voices whose samples say where they are: n at 24 kHz and at 16 kHz n / 1.5."""
    folder = tmp_path_factory.mktemp("ramps")
    clips = []
    for number in range(20):
        size = 3 * (4000 + 400 * number)
        target = (np.arange(size) % 30_000 + 1).astype(np.int16)
        voice = CANONICAL if number % 2 else "hibari-morph-007"
        clips.append(
            TargetClip(str(number), "", f"{voice}:ramp", target, target[: size // 3 * 3].reshape(-1, 3)[:, :2].ravel())
        )
    write_target_shard(folder, 0, clips[:12])
    write_target_shard(folder, 1, clips[12:])
    return folder


def loader(folder, seed=0, **changes):
    return TargetLoader(TargetDataConfig(folders=(str(folder),), row_seconds=0.8, batch_rows=4, **changes), seed)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@pytest.mark.parametrize("crops", [False, True])
def test_both_sides_of_a_row_are_in_step(ramps, crops):
    for batch in islice(loader(ramps, crops=crops), 6):
        assert batch.targets.shape == (4, 10 * 1920)
        assert batch.heard.shape == (4, 10 * 1280)
        triples, pairs = batch.targets.unflatten(1, (-1, 3)), batch.heard.unflatten(1, (-1, 2))
        assert torch.equal(triples[:, :, :2], pairs)
        assert (batch.targets > 0).float().mean() > 0.5


def test_rows_keep_to_one_voice(ramps):
    chosen = loader(ramps)
    for row in chosen._plan(0):
        assert len({chosen.utterances[i].speaker for i in row}) == 1
    canonical = torch.cat([batch.canonical for batch in islice(chosen, 3)])
    assert canonical.any()
    assert not canonical.all()


def test_order_follows_the_seed_and_can_be_resumed(ramps):
    first, again, other = (list(islice(loader(ramps, seed), 4)) for seed in (0, 0, 1))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not all(same(a, b) for a, b in zip(first, other, strict=True))
    resumed = loader(ramps)
    source = loader(ramps)
    list(islice(source, 3))
    resumed.load_state_dict(source.state_dict())
    assert same(next(iter(resumed)), next(iter(source)))


def test_share_of_rows_heard_from_themselves(ramps):
    assert not next(iter(loader(ramps, own_share=0.0))).own.any()
    assert next(iter(loader(ramps, own_share=1.0))).own.all()


def test_targets_are_speech_in_the_other_voice(ramps):
    shards, targets = SpeechShards((str(ramps),)), loader(ramps)
    assert len(shards.utterances) == len(targets.utterances) == 20
    for heard, target in zip(shards.utterances, targets.utterances, strict=True):
        pairs = targets.wave(target)
        pairs = pairs[: len(pairs) // 3 * 3].reshape(-1, 3)[:, :2].ravel()
        assert np.array_equal(shards.wave(heard)[: len(pairs)], pairs)
        assert heard.samples * 3 == target.samples * 2


def test_what_cannot_be_loaded_is_named(ramps, tmp_path):
    with pytest.raises(CheckpointError, match="no target shards"):
        loader(tmp_path)
    with pytest.raises(CheckpointError, match="no folder with targets"):
        TargetLoader(TargetDataConfig(), 0)
    with pytest.raises(CheckpointError, match="holds no speech shards"):
        SpeechShards((str(tmp_path),))
    with pytest.raises(CheckpointError, match="too few"):
        next(iter(TargetLoader(TargetDataConfig(folders=(str(ramps),), row_seconds=80.0, batch_rows=4), 0)))
    clip = TargetClip("a", "", CANONICAL, np.ones(30, np.int16), np.ones(20, np.int16))
    write_target_shard(tmp_path, 0, [clip])
    np.save(tmp_path / "target-00000.heard.npy", np.ones(19, np.int16))
    with pytest.raises(CheckpointError, match="does not fit its arrays"):
        loader(tmp_path)
    with pytest.raises(VoiceError, match="do not last as long"):
        write_target_shard(tmp_path, 1, [TargetClip("a", "", CANONICAL, np.ones(30, np.int16), np.ones(19, np.int16))])


@pytest.mark.parametrize("hertz", [110, 1000, 5000])
def test_resampling_keeps_tones_in_place(hertz):
    at_24k, expected = (
        torch.sin(2 * torch.pi * hertz * torch.arange(r).double() / r).float() for r in (24_000, 16_000)
    )
    out = to_16k(at_24k[None])
    assert out.shape == (1, 16_000)
    assert torch.allclose(out[0, 200:-200], expected[200:-200], atol=2e-3)


def test_resampling_removes_what_16_khz_cannot_hold():
    tone = torch.sin(2 * torch.pi * 9000 * torch.arange(24_000) / 24_000)
    assert to_16k(tone[None])[0, 200:-200].abs().max() < 5e-3


def test_pairs_say_the_same_at_the_same_time():
    pytest.importorskip("hibari")
    clip = speak_target(PlannedClip("0", SENTENCES[0], CANONICAL), seed=1)
    assert len(clip.target) * 2 == len(clip.heard) * 3
    assert clip.voice.startswith(f"{CANONICAL}:speed=")

    def loudness(wave: np.ndarray, size: int) -> np.ndarray:
        frames = wave[: len(wave) // size * size].reshape(-1, size).astype(np.float64)
        return np.log(np.sqrt(np.mean(frames**2, 1)) + 1.0)

    a, b = loudness(clip.target, 480), loudness(clip.heard, 320)
    assert np.corrcoef(a[: len(b)], b[: len(a)])[0, 1] > 0.85
    assert not np.array_equal(clip.heard, speak_target(PlannedClip("0", SENTENCES[0], CANONICAL, 1), seed=1).heard)
    with pytest.raises(VoiceError, match="cannot be a target"):
        speak_target(PlannedClip("0", SENTENCES[0], "flite-rms"))


def test_synthesised_targets_are_complete_and_belong_to_their_plan(tmp_path):
    pytest.importorskip("hibari")
    plan = [
        PlannedClip(str(i), text, voice) for i, text in enumerate(SENTENCES) for voice in (CANONICAL, "hibari-morph")
    ]
    report = synthesise(plan, tmp_path, 1, per_shard=4, kind=TARGETS)
    assert (report.utterances, report.skipped) == (6, ())
    assert sorted(p.name for p in tmp_path.glob("target-*.npy")) == [
        "target-00000.heard.npy",
        "target-00000.npy",
        "target-00000.pitch.npy",
        "target-00001.heard.npy",
        "target-00001.npy",
        "target-00001.pitch.npy",
    ]
    found = TargetLoader(TargetDataConfig(folders=(str(tmp_path),), row_seconds=2.0, batch_rows=1), 0)
    batch = next(iter(found))
    pitch, wave = batch.pitch[0], batch.targets[0].double()
    checked = 0
    for frame in np.flatnonzero((pitch > 90) & (pitch < 400))[5:-5]:
        # A stretch of steady voice looks like itself a period later, and not half a period later.
        period, at = 24_000 / float(pitch[frame]), int(frame) * 240 - 480
        if abs(pitch[frame - 3] - pitch[frame + 3]) < 0.03 * pitch[frame] and at + 2400 < len(wave) and at > 0:
            stretch = [wave[at + shift : at + shift + 720] for shift in (0, round(period), round(period / 2))]
            same, half = (float(torch.nn.functional.cosine_similarity(stretch[0], other, 0)) for other in stretch[1:])
            checked += same > max(0.6, half)
            checked -= same < 0.3
    assert checked >= 5
    assert {item.speaker.rpartition("-")[0] for item in found.utterances} == {"hibari", "hibari-morph"}
    assert synthesise(plan, tmp_path, 1, per_shard=4, kind=TARGETS).hours == report.hours
    with pytest.raises(UserError, match="another plan"):
        synthesise(plan, tmp_path, 1, per_shard=4)
