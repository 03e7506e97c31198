"""Vocoders: streaming equals offline, exact lengths, the published architecture and its joining of pieces."""

import pytest
import torch

from kimi_mm.audio.bigvgan import BigVGAN, SnakeBeta, kaiser_sinc_filter
from kimi_mm.audio.detokenizer_config import BigVGANConfig, DetokenizerConfig, VocoderConfig, kimi_audio_detokenizer
from kimi_mm.audio.key_maps import vocoder_from_published, vocoder_to_published
from kimi_mm.audio.overlap import overlap_step
from kimi_mm.audio.target_mel import SILENCE
from kimi_mm.audio.vocoder import Vocoder, VocoderState
from kimi_mm.config import ConfigError
from kimi_mm.errors import CheckpointError

HOP, BINS = 480, 12
SMALL = VocoderConfig(hidden_size=16, num_layers=2, intermediate_size=32)
TINY_GAN = BigVGANConfig(initial_channels=128, resblock_kernels=(3, 5))


@pytest.fixture(scope="module")
def vocoder() -> Vocoder:
    torch.manual_seed(0)
    return Vocoder(SMALL, BINS, HOP).eval()


def speechlike(frames: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, frames, BINS, generator=torch.Generator().manual_seed(frames)) * 2 - 4


@torch.inference_mode()
@pytest.mark.parametrize("pieces", [[1] * 31, [2, 0, 29], [10, 1, 20], [30, 1], [31]])
@pytest.mark.parametrize(("look_ahead", "source"), [(0, False), (2, False), (3, True), (2, True)])
def test_stream_equals_whole(pieces, look_ahead, source):
    torch.manual_seed(0)
    vocoder = Vocoder(SMALL.replace(look_ahead=look_ahead, source=source), BINS, HOP).eval()
    mel = speechlike(31, rows=2)
    whole = vocoder(mel)
    assert whole.shape == (2, 31 * HOP)
    state, out = vocoder.initial_state(2), []
    for piece in mel.split(pieces, 1):
        wave, state = vocoder.step(piece, state, final=False)
        out.append(wave)
    wave, _ = vocoder.step(mel[:, :0], state, final=True)
    assert wave.shape[1] <= vocoder.delay
    # Rounding of the pitch adds up in the phase of a source, and counts a hundredfold in its highest harmonics.
    assert torch.allclose(torch.cat([*out, wave], 1), whole, atol=1e-3 if source else 1e-5)


@torch.inference_mode()
def test_the_future_is_heard_no_further_than_the_look_ahead(vocoder):
    mel = speechlike(60)
    changed = mel.clone()
    changed[:, 40] += 3.0
    moved = (vocoder(changed) - vocoder(mel)).abs()[0] > 0
    first, last = int(moved.nonzero()[0]), int(moved.nonzero()[-1])
    assert first >= (40 - SMALL.look_ahead) * HOP - SMALL.n_fft // 2
    assert last <= (40 + vocoder.receptive_frames) * HOP


@torch.inference_mode()
def test_silence_before_a_recording_changes_nothing(vocoder):
    mel = speechlike(20)
    later = torch.cat([torch.full((1, 45, BINS), SILENCE), mel], 1)
    assert torch.allclose(vocoder(later)[:, 45 * HOP :], vocoder(mel), atol=1e-5)


def test_overlapping_windows_rebuild_a_wave(vocoder):
    wave = torch.randn(1, 48_000)
    frames = wave.unfold(1, SMALL.n_fft, vocoder.step_size) * torch.hann_window(SMALL.n_fft) * vocoder.window
    rebuilt, tail = vocoder._overlap_add(frames, torch.zeros(1, SMALL.n_fft - vocoder.step_size))
    edge = SMALL.n_fft
    assert torch.allclose(rebuilt[:, edge:], wave[:, edge : rebuilt.shape[1]], atol=1e-5)
    assert tail.shape[1] == SMALL.n_fft - vocoder.step_size


@torch.inference_mode()
def test_wild_input_stays_finite_and_within_range(vocoder):
    for value in (-1e4, 1e4, 80.0):
        wave = vocoder(torch.full((1, 9, BINS), value))
        assert wave.isfinite().all()
        assert wave.abs().max() <= 1.0


def test_windows_that_do_not_add_up_are_refused():
    with pytest.raises(ConfigError, match="n_fft=1000"):
        DetokenizerConfig(vocoder=SMALL.replace(n_fft=1000))
    with pytest.raises(ConfigError, match="multiply to 240"):
        DetokenizerConfig(bigvgan=BigVGANConfig(upsample_rates=(5, 2, 2, 2, 2, 3), upsample_kernels=(9, 4, 4, 4, 4, 5)))
    with pytest.raises(ConfigError, match="exactly one"):
        DetokenizerConfig()


# ---- the published vocoder ------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_bigvgan_makes_a_hop_of_samples_from_each_frame():
    gan = BigVGAN(TINY_GAN, BINS).eval()
    assert gan(speechlike(7, rows=2)).shape == (2, 7 * HOP)


def test_low_pass_has_the_published_shape():
    taps = kaiser_sinc_filter()[0, 0]
    spectrum = torch.fft.rfft(taps, 1024).abs()
    assert torch.allclose(taps, taps.flip(0), atol=1e-7)
    assert abs(float(taps.sum()) - 1) < 1e-6
    assert spectrum[:51].min() > 0.99  # up to a twentieth of the rate
    assert spectrum[450:].max() < 0.01


@torch.inference_mode()
def test_activation_keeps_length_and_folds_harmonics_less():
    snake = SnakeBeta(1)
    time = torch.arange(4800) / 4800
    tone = torch.sin(2 * torch.pi * 1500 * time)[None, None]
    out = snake(tone)[0, 0]
    assert out.shape == (4800,)
    bare = tone[0, 0] + tone[0, 0].sin().square()

    def folded(wave: torch.Tensor) -> float:  # twice 1500 Hz is above half the rate: it lands on 1800 Hz
        return float(torch.fft.rfft(wave[500:4500] * torch.hann_window(4000)).abs()[1500])

    assert folded(out) < 0.3 * folded(bare)


def test_published_vocoder_in_size_and_names():
    with torch.device("meta"):
        config = kimi_audio_detokenizer().bigvgan
        assert config is not None
        published = vocoder_to_published(BigVGAN(config, 80))
    assert len(published) == 1206
    assert sum(t.numel() for t in published.values()) * 4 == 964_475_108
    assert published["resblocks.27.convs1.2.weight_v"].shape == (16, 16, 11)
    assert published["resblocks.3.activations.5.downsample.lowpass.filter"].shape == (1, 1, 12)
    assert published["ups.0.0.weight_g"].shape == (2048, 1, 1)
    assert "conv_post.bias" not in published


@torch.inference_mode()
def test_published_checkpoint_is_read_and_its_weight_norm_fused():
    gan = BigVGAN(TINY_GAN, BINS).eval()
    published = vocoder_to_published(gan)
    scaled = {name: 3 * t if name.endswith("weight_v") else t for name, t in published.items()}  # only directions count
    twin = BigVGAN(TINY_GAN, BINS).eval()
    twin.load_state_dict(vocoder_from_published(twin, scaled))
    mel = speechlike(5)
    assert torch.allclose(twin(mel), gan(mel), atol=1e-5)
    with pytest.raises(CheckpointError, match=r"ups\.0\.0\.weight"):
        vocoder_from_published(twin, {k: v for k, v in published.items() if k != "ups.0.0.weight_g"})


def pieces_of(frames: list[int], fade: str, final: bool = True) -> tuple[list[int], list[int], torch.Tensor]:
    """Joins pieces of a vocoder that gives ones; returns lengths that came out, lengths kept, and the wave."""
    state = VocoderState((torch.zeros(1, 0, BINS), torch.zeros(1, 0)))
    given, kept, waves = [], [], []
    for number, count in enumerate(frames):
        last = final and number == len(frames) - 1
        wave, state = overlap_step(
            lambda mel: torch.full((1, mel.shape[1] * HOP), 0.5), torch.zeros(1, count, BINS), state, last, HOP, fade
        )
        given.append(wave.shape[1])
        kept.append(state.tensors[1].shape[1])
        waves.append(wave[0])
    return given, kept, torch.cat(waves)


def test_pieces_have_the_published_lengths():
    given, kept, _ = pieces_of([72, 120, 120, 88], "hamming")
    assert given == [17_280, 34_560, 80_640, 59_520]
    assert kept == [17_280, 40_320, 17_280, 0]


@pytest.mark.parametrize("frames", [[1, 1, 1], [3, 40, 2], [120, 1, 1, 1], [5], [0, 4, 0, 9]])
def test_pieces_of_any_size_add_up(frames):
    given, _, wave = pieces_of(frames, "hann")
    assert sum(given) == sum(frames) * HOP
    assert torch.allclose(wave, torch.full_like(wave, 0.5), atol=1e-6)


def test_the_published_fade_is_eight_per_cent_too_loud():
    _, _, wave = pieces_of([72, 120, 120, 88], "hamming")
    assert abs(float(wave.max()) - 0.54) < 1e-3
    assert float(wave.min()) == 0.5
