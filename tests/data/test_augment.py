import pytest
import torch

from kimi_mm.data.augment import AugmentConfig, augment

OFF = dict.fromkeys(("room", "noise", "babble", "tilt", "telephone", "wideband", "quantise"), 0.0)
QUIET = AugmentConfig(**OFF, gain_db=(0.0, 0.0))


@pytest.fixture
def speech() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    time = torch.arange(16_000) / 16_000
    tones = [200.0, 1000.0, 5000.0, 7600.0]
    waves = sum(torch.sin(2 * torch.pi * f * time + f) for f in tones)[None].repeat(4, 1) * 0.05
    lengths = torch.tensor([16_000, 12_000, 8_000, 16_000])
    waves = waves * (torch.arange(16_000) < lengths[:, None])
    return waves, lengths


def level(waves: torch.Tensor, hertz: float) -> torch.Tensor:
    spectrum = torch.fft.rfft(waves[:, :16_000]).abs()
    near = round(hertz)
    return spectrum[:, near - 2 : near + 3].max(1).values


def test_nothing_asked_for_changes_nothing(speech) -> None:
    waves, lengths = speech
    torch.testing.assert_close(augment(waves, lengths, QUIET), waves, atol=1e-5, rtol=1e-4)


def test_shapes_range_and_repeatability(speech) -> None:
    waves, lengths = speech
    torch.manual_seed(5)
    first = augment(waves, lengths, AugmentConfig())
    torch.manual_seed(5)
    second = augment(waves, lengths, AugmentConfig())
    assert first.shape == waves.shape
    assert torch.isfinite(first).all()
    assert first.abs().max() <= 1.0
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, waves, atol=1e-3)


def test_telephone_band_and_wide_band(speech) -> None:
    waves, lengths = speech
    phone = augment(waves, lengths, QUIET.replace(telephone=1.0))
    wide = augment(waves, lengths, QUIET.replace(wideband=1.0))
    for hertz, kept_phone, kept_wide in ((200, False, True), (1000, True, True), (5000, False, True)):
        before = level(waves, hertz)
        assert bool((level(phone, hertz) > 0.8 * before).all()) == kept_phone
        assert bool((level(phone, hertz) < 0.2 * before).all()) != kept_phone
        assert bool((level(wide, hertz) > 0.8 * before).all()) == kept_wide
    assert (level(wide, 7600) < 0.25 * level(waves, 7600)).all()


def test_noise_has_the_asked_level(speech) -> None:
    waves, lengths = speech
    noisy = augment(waves, lengths, QUIET.replace(noise=1.0, noise_snr_db=(10.0, 10.0)))
    signal = waves.square().sum(1) / lengths
    ratio = 10 * torch.log10(signal / (noisy - waves).square().mean(1))
    torch.testing.assert_close(ratio, torch.full((4,), 10.0), atol=0.2, rtol=0.0)


def test_rooms_keep_the_level_also_of_padded_rows(speech) -> None:
    waves, lengths = speech
    wet = augment(waves, lengths, QUIET.replace(room=1.0))
    assert (wet - waves).abs().max() > 1e-3
    before = (waves.square().sum(1) / lengths).sqrt()
    after = (wet.square().sum(1) / lengths).sqrt()
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.0)


def test_silent_rows_stay_finite() -> None:
    out = augment(torch.zeros(3, 4000), torch.tensor([4000, 1, 0]), AugmentConfig())
    assert torch.isfinite(out).all()
