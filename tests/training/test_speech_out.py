"""Training of detokenizer and vocoder: what is judged, which gradients flow, that it learns and resumes exactly."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kimi_mm.audio.flow import draw_times, time_grid
from kimi_mm.checkpoint import load_checkpoint
from kimi_mm.config import ConfigError
from kimi_mm.data.debug import write_debug_targets
from kimi_mm.data.target_loader import TargetLoader
from kimi_mm.errors import CheckpointError
from kimi_mm.model import Model
from kimi_mm.training.discriminators import (
    Discriminators,
    PeriodDiscriminator,
    discriminator_loss,
    generator_loss,
    halves,
)
from kimi_mm.training.recipe import load_recipe
from kimi_mm.training.run import train
from kimi_mm.training.spectral import SpectralDistance
from kimi_mm.training.speech_out import FlowObjective, VocoderObjective, draw_chunks
from kimi_mm.training.speech_out_config import FlowTrainingConfig, TargetDataConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return write_debug_targets(tmp_path_factory.mktemp("targets"))


def setup(stage: str, targets, **changes):
    """Objective and one batch of a stage at debug size."""
    recipe, config = load_recipe(f"{stage}/nano", debug=True)
    changes = {"target": recipe.target.replace(folders=(str(targets),), batch_rows=3), **changes}
    recipe = recipe.replace(**changes)
    torch.manual_seed(0)
    model = Model(config)
    objective = {"detokenizer": FlowObjective, "vocoder": VocoderObjective}[stage](model, recipe)
    return objective.train(), next(iter(TargetLoader(recipe.target, 0))), model


# ---- flow matching --------------------------------------------------------------------------------------------------


def test_chunks_cover_the_row_in_whole_codes():
    torch.manual_seed(0)
    config = FlowTrainingConfig(min_chunk_codes=3, max_chunk_codes=7, whole_share=0.0)
    lengths = set()
    for _ in range(50):
        chunks = draw_chunks(40, config, 4, CPU)
        assert len(chunks) == 160
        sizes = torch.bincount(chunks)
        assert (chunks.diff() >= 0).all()
        assert (sizes % 4 == 0).all()
        lengths |= set((sizes[:-1] // 4).tolist())
        assert 1 <= sizes[-1] // 4 <= 7
    assert lengths == {3, 4, 5, 6, 7}
    assert draw_chunks(40, FlowTrainingConfig(whole_share=1.0), 4, CPU).unique().tolist() == [0]


def test_a_perfect_velocity_costs_nothing(targets, monkeypatch):
    objective, batch, _ = setup("detokenizer", targets)
    mel = objective.mel.normalize(objective.mel(batch.targets.float() / 32768))

    def perfect(x, time, cond, context):
        t, size = time[:, : mel.shape[1], None], mel.shape[1]
        noise = (x[:, :size] - t * mel) / (1 - (1 - objective.sigma_min) * t)
        velocity = mel - (1 - objective.sigma_min) * noise
        assert torch.equal(x[:, size:], mel)  # the past is clean
        assert time[:, size:].unique().tolist() == pytest.approx([0.999])
        return torch.cat([velocity, torch.zeros_like(mel)], 1)

    monkeypatch.setattr(objective.dit, "forward", perfect)
    assert objective(batch, False)["flow"] < 1e-4


def test_other_voices_are_judged_after_the_prompt_only(targets, monkeypatch):
    objective, batch, _ = setup("detokenizer", targets)
    whole = torch.repeat_interleave(torch.arange(6), 20)  # six chunks of 0.4 s
    assert objective._prompt_frames(whole) == 60
    wrong = []

    def guess(x, time, cond, context):
        out = torch.zeros_like(x)
        out[:, :60] = 1e3  # far off wherever the first second is judged
        wrong.append(out)
        return out

    monkeypatch.setattr(objective.dit, "forward", guess)
    monkeypatch.setattr("kimi_mm.training.speech_out.draw_chunks", lambda *_: whole)
    batch.canonical[:] = False
    assert objective(batch, False)["flow"] < 100
    batch.canonical[0] = True
    assert objective(batch, False)["flow"] > 1e5


def test_dropped_codes_do_not_reach_the_drawing(targets):
    objective, batch, _ = setup("detokenizer", targets, flow=FlowTrainingConfig(code_dropout=1.0, whole_share=1.0))
    for parameter in objective.dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def loss() -> float:
        torch.manual_seed(5)
        return objective(batch, False)["flow"].item()

    without = loss()
    batch.targets, same = batch.targets.clone(), batch.targets
    batch.own[:] = False
    batch.heard = torch.randint_like(batch.heard.int(), -9000, 9000).short()
    assert loss() == pytest.approx(without)  # one whole chunk sees no past, and its own codes are gone
    batch.targets = same.flip(1)
    assert loss() != pytest.approx(without)


def test_times_are_drawn_as_steps_lie(targets):
    """Evenly, or as many on each of a cosine solver's steps."""
    torch.manual_seed(0)
    for kind in ("linear", "cosine"):
        drawn = draw_times((200, 50), kind, torch.device("cpu"))
        assert drawn.shape == (200, 50)
        counts = torch.histogram(drawn, torch.tensor(time_grid(4, kind))).hist
        assert counts.sum() == 10_000
        assert counts.min() > 2300
    objective, batch, _ = setup("detokenizer", targets, flow=FlowTrainingConfig(times="cosine"))
    assert torch.isfinite(objective(batch, False)["flow"])
    with pytest.raises(ConfigError, match="times"):
        FlowTrainingConfig(times="sine")


# ---- vocoder --------------------------------------------------------------------------------------------------------


def test_gradients_of_vocoder_and_discriminators_are_kept_apart(targets):
    objective, batch, _ = setup("vocoder", targets)
    vocoder, judges = objective.clip_groups()

    def gradients(loss: torch.Tensor, parameters: list) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True))

    torch.manual_seed(1)
    losses = objective(batch, True)
    weights = objective.config
    made = weights.mel_weight * losses["mel"] + weights.stft_weight * losses["stft"] + losses["pitch"]
    made = made + weights.adversarial_weight * losses["generator"] + weights.feature_weight * losses["features"]
    for parameters, own, other in ((vocoder, made, losses["discriminator"]), (judges, losses["discriminator"], made)):
        assert all(g is None for g in gradients(other, parameters))
        for a, b in zip(gradients(losses["loss"], parameters), gradients(own, parameters), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert set(objective(batch, False)) == {"loss", "mel", "stft", "pitch"}


def test_distances_vanish_for_equal_waves_and_grow_with_the_difference():
    distance, wave = SpectralDistance(24_000), torch.randn(2, 9000) * 0.1
    for measure in (distance.mel, distance.stft):
        near, far = (float(measure(wave + size * torch.randn_like(wave), wave)) for size in (0.01, 0.1))
        assert float(measure(wave, wave)) == pytest.approx(0, abs=1e-5)
        assert 0 < near < far


def test_scores_of_least_squares():
    one, zero = (torch.ones(3), [torch.ones(2)]), (torch.zeros(3), [torch.zeros(2)])
    assert discriminator_loss([one], [zero]) == 0
    assert discriminator_loss([zero], [one]) == 2
    assert generator_loss([one], [one]) == (0, 0)
    assert generator_loss([one], [zero]) == (1, 1)


def test_magnitudes_are_those_of_torch():
    distance, wave = SpectralDistance(24_000), torch.randn(2, 3000)
    expected = torch.stft(wave, 512, 128, window=torch.hann_window(512), return_complex=True).abs().transpose(1, 2)
    assert torch.allclose(distance._magnitude(wave, 512, 128), expected, atol=1e-3)


def test_discriminators_judge_alike_with_channels_last_and_side_by_side():
    torch.manual_seed(0)
    judges, real, fake = Discriminators((2, 3), (512,), 4), torch.randn(2, 3001), torch.randn(2, 3001)
    for wave, judged in zip((real, fake), halves(judges(torch.cat([real, fake]))), strict=True):
        for part, (scores, features) in zip(judges.parts, judged, strict=True):
            if isinstance(part, PeriodDiscriminator):
                x = F.pad(wave, (0, -3001 % part.period)).view(2, 1, -1, part.period)
            else:
                x = torch.stft(wave, 512, 128, window=torch.hann_window(512), center=False, return_complex=True)
                x = (x.abs().square() + 1e-9).pow(1 / 6).transpose(1, 2)[:, None]
            for layer, feature in zip(part.layers, features, strict=True):
                x = F.leaky_relu(layer(x.contiguous()), 0.1)
                assert torch.allclose(feature, x, atol=1e-5)
                assert feature.is_contiguous(memory_format=torch.channels_last)
            assert torch.allclose(scores, part.last(x), atol=1e-5)


def test_rows_too_short_to_be_judged_are_refused(targets):
    with pytest.raises(ConfigError, match="too short"):
        setup("vocoder", targets, target=TargetDataConfig(folders=(str(targets),), row_seconds=0.32))


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["detokenizer/nano", "vocoder/nano"])
def test_resumed_run_equals_uninterrupted_run(recipe, tmp_path):
    whole = train(recipe, debug=True, output=tmp_path / "whole")
    train(recipe, debug=True, output=tmp_path / "cut", overrides=["stop_after=2"])
    resumed = train(recipe, debug=True, output=tmp_path / "cut")
    whole, resumed = ({k: v for k, v in numbers.items() if "second" not in k} for numbers in (whole, resumed))
    assert resumed == whole
    last = "step-0000004/model.safetensors"
    a, b = load_file(tmp_path / "whole" / last), load_file(tmp_path / "cut" / last)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("stage", "loss"), [("detokenizer", "flow_late"), ("vocoder", "mel")])
def test_learning_happens(stage, loss, targets):
    objective, batch, _ = setup(stage, targets)
    optimizer, values = torch.optim.AdamW(objective.parameters(), lr=3e-3), []
    for _ in range(30):
        losses = objective(batch, False)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        values.append(losses[loss].item())
    assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5])


def test_halves_of_a_voice_are_joined(tmp_path):
    short = ["steps=2", "save_every=2"]
    train("text/nano", debug=True, output=tmp_path / "mute", overrides=short)
    mute = f"init={tmp_path / 'mute' / 'model'}"
    train("vocoder/nano", debug=True, output=tmp_path / "vocoder", overrides=[*short, mute])
    half = f"init_vocoder={tmp_path / 'vocoder' / 'model'}"
    train("detokenizer/nano", debug=True, output=tmp_path / "voice", overrides=[*short, mute, half])
    start, vocoder, voice = (load_checkpoint(tmp_path / name / "model")[0] for name in ("mute", "vocoder", "voice"))
    assert start.detokenizer is None
    ours = voice.state_dict()
    for name, tensor in start.state_dict().items():  # everything but the voice came through untouched
        assert torch.equal(tensor, ours[name]), name
    for name, tensor in vocoder.state_dict().items():
        if name.startswith("detokenizer.vocoder."):
            assert torch.equal(tensor, ours[name]), name
    assert not torch.equal(
        ours["detokenizer.dit.output.weight"], torch.zeros_like(ours["detokenizer.dit.output.weight"])
    )


def test_bad_starts_are_refused_before_training(tmp_path):
    with pytest.raises(CheckpointError, match="no target shards"):
        train("vocoder/nano", debug=True, output=tmp_path, overrides=[f"target.folders=[{tmp_path}]"])
    with pytest.raises(ConfigError, match="needs a model with a detokenizer"):
        train("vocoder/nano", debug=True, output=tmp_path, overrides=["detokenizer="])
    with pytest.raises(ConfigError, match=r"multiple of 0\.08"):
        train("vocoder/nano", debug=True, output=tmp_path, overrides=["target.row_seconds=1.0"])
    with pytest.raises(CheckpointError, match="too few for a batch of 999"):
        train("vocoder/nano", debug=True, output=tmp_path, overrides=["target.batch_rows=999"])


def test_recipes_name_the_presets_they_train():
    for stage in ("detokenizer", "vocoder"):
        recipe, model = load_recipe(f"{stage}/nano")
        assert recipe.stage == stage
        assert model.detokenizer is not None
        assert json.dumps(model.to_dict())
        assert np.isclose(model.detokenizer.samples_per_code / model.detokenizer.mel.sample_rate, 0.08)
