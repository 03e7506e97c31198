"""The encoder against transformers' Whisper, and block by block against the whole."""

import pytest
import torch

from kimi_mm.audio.encoder import AudioEncoder, EncoderState, attention_mask
from kimi_mm.config import AudioEncoderConfig

SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48}


def make(**changes: object) -> AudioEncoder:
    torch.manual_seed(0)
    return AudioEncoder(AudioEncoderConfig(**{**SIZES, **changes}), 20).eval()


@pytest.fixture
def causal() -> AudioEncoder:
    return make(max_positions=40, block_size=8)


@pytest.mark.parametrize("final_norm", [True, False])
@torch.no_grad()
def test_equals_transformers(final_norm: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        num_mel_bins=20,
        max_source_positions=50,
        decoder_layers=1,
        decoder_attention_heads=4,
        vocab_size=16,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    torch.manual_seed(1)
    theirs = transformers.models.whisper.modeling_whisper.WhisperEncoder(config).eval()
    for parameter in theirs.parameters():
        parameter.normal_(0, 0.2)
    ours = make(
        max_positions=50, causal_convolution=False, block_size=None, learned_positions=True, final_norm=final_norm
    )
    state = {k.replace("embed_positions.weight", "positions"): v for k, v in theirs.state_dict().items()}
    if not final_norm:
        theirs.layer_norm = torch.nn.Identity()
        state = {k: v for k, v in state.items() if not k.startswith("layer_norm")}
    ours.load_state_dict(state, strict=True)
    mel = torch.randn(2, 100, 20)
    torch.testing.assert_close(ours(mel), theirs(mel.transpose(1, 2)).last_hidden_state, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sinusoids_are_whispers() -> None:
    modeling = pytest.importorskip("transformers.models.whisper.modeling_whisper")
    ours = make(max_positions=1500, block_size=None).positions
    torch.testing.assert_close(ours, modeling.sinusoids(1500, 32), atol=1e-4, rtol=0)  # theirs has fp32 angles


@pytest.mark.parametrize("frames", [2, 6, 16, 18, 80, 82, 230])
@torch.no_grad()
def test_blocks_equal_whole(causal: AudioEncoder, frames: int) -> None:
    """16 mel frames are a block and 80 a segment; 230 are two segments and most of a third."""
    mel = torch.randn(2, frames, 20)
    state, outputs = EncoderState(), []
    for block in mel.split(16, 1):
        out, state = causal.step(block, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), causal(mel), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_copied_state_goes_on_by_itself(causal: AudioEncoder) -> None:
    first, left, right = torch.randn(3, 1, 16, 20)
    _, state = causal.step(first, EncoderState())
    twin = state.clone()
    left_out, _ = causal.step(left, state)
    right_out, _ = causal.step(right, twin)
    torch.testing.assert_close(left_out, causal(torch.cat([first, left], 1))[:, 8:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(right_out, causal(torch.cat([first, right], 1))[:, 8:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_segments_are_independent(causal: AudioEncoder) -> None:
    mel = torch.randn(1, 200, 20)
    alone = torch.cat([causal(piece) for piece in mel.split(80, 1)], 1)
    torch.testing.assert_close(causal(mel), alone)


@torch.no_grad()
def test_later_blocks_do_not_matter(causal: AudioEncoder) -> None:
    mel = torch.randn(1, 64, 20)
    changed = mel.clone()
    changed[:, 32:] += 1
    before, after = causal(mel), causal(changed)
    torch.testing.assert_close(before[:, :16], after[:, :16])
    assert not torch.allclose(before[:, 16:], after[:, 16:])


@pytest.mark.parametrize("block_size", [8, None])
@torch.no_grad()
def test_padding_is_hidden(block_size: int | None) -> None:
    encoder = make(max_positions=40, block_size=block_size)
    mel = torch.randn(3, 120, 20)
    lengths = torch.tensor([5, 40, 47])
    out = encoder(mel, lengths)
    assert out.isfinite().all()
    for row, length in zip(range(3), lengths.tolist(), strict=True):
        alone = encoder(mel[row : row + 1, : 2 * length])
        torch.testing.assert_close(out[row : row + 1, :length], alone, atol=1e-5, rtol=1e-5)


def test_attention_mask() -> None:
    device = torch.device("cpu")
    assert attention_mask(4, None, None, device) is None
    assert attention_mask(4, 4, None, device) is None
    mask = attention_mask(4, 2, None, device)
    assert mask is not None
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    mask = attention_mask(3, None, torch.tensor([[False, False, False]]), device)
    assert mask is not None
    assert mask.int().tolist() == [[[[1, 0, 0]]]]
