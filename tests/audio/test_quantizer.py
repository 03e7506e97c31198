"""Nearest codes, the moving codebook, and blocks against the whole."""

import pytest
import torch

from kimi_mm.audio.quantizer import QuantizerState, VectorQuantizer, usage
from kimi_mm.config import AudioEncoderConfig, AudioTokenizerConfig, QuantizerConfig
from kimi_mm.errors import UserError

ENCODER = AudioEncoderConfig(hidden_size=6, num_layers=1, num_heads=2, block_size=8, max_positions=40)


def make(**changes: object) -> VectorQuantizer:
    torch.manual_seed(0)
    sizes = {"codebook_size": 16, "codebook_dim": 6, "hidden_size": 8, "num_heads": 2}
    quantizer = QuantizerConfig(**{**sizes, **changes})
    return VectorQuantizer(AudioTokenizerConfig(encoder=ENCODER, quantizer=quantizer)).eval()


def test_nearest_takes_the_first_on_ties() -> None:
    quantizer = make()
    vectors = torch.randn(50, 6)
    brute = torch.cdist(vectors.double(), quantizer.codebook.double()).argmin(1)
    assert torch.equal(quantizer.nearest(vectors), brute)
    quantizer.codebook[9] = quantizer.codebook[4]
    assert quantizer.nearest(quantizer.codebook[[9, 4]]).tolist() == [4, 4]


def test_published_style_quantizes_the_average_of_four_frames() -> None:
    quantizer = make(hidden_layers=0)
    frames = torch.randn(2, 20, 6)
    features = frames.unflatten(1, (-1, 4)).flatten(2)
    pooled = torch.nn.functional.avg_pool1d(frames.transpose(1, 2), 4).transpose(1, 2)
    torch.testing.assert_close(quantizer.project(features), pooled)
    assert torch.equal(quantizer(features).codes, torch.cdist(pooled, quantizer.codebook[None]).argmin(-1))
    assert not list(quantizer.parameters())
    with pytest.raises(UserError, match="must equal"):
        make(hidden_layers=0, codebook_dim=4)


@pytest.mark.parametrize("codes", [1, 2, 3, 10, 11, 25])
@torch.no_grad()
def test_blocks_equal_whole(codes: int) -> None:
    """Two codes are a block and ten a segment."""
    quantizer, features = make(), torch.randn(1, codes, 24)
    state, pieces = QuantizerState(), []
    for block in features.split(2, 1):
        out, state = quantizer.step(block, state)
        pieces.append(out)
    assert torch.equal(torch.cat(pieces, 1), quantizer(features).codes)


@torch.no_grad()
def test_masked_rows_change_nothing_before_them() -> None:
    quantizer, features = make(), torch.randn(1, 3, 24)
    padded = torch.cat([features, torch.randn(1, 9, 24)], 1)
    mask = torch.arange(12)[None] < 3
    torch.testing.assert_close(quantizer.project(padded, mask)[:, :3], quantizer.project(features))
    assert quantizer.project(padded, mask).isfinite().all()


def test_straight_through_gradient_and_loss() -> None:
    quantizer = make(hidden_layers=0, commitment_weight=0.5)
    features = torch.randn(1, 4, 24, requires_grad=True)
    mask = torch.tensor([[True, True, False, True]])
    out = quantizer(features, mask)
    torch.testing.assert_close(out.quantized, quantizer.codebook[out.codes])
    (gradient,) = torch.autograd.grad(out.quantized.sum(), features, retain_graph=True)
    torch.testing.assert_close(gradient, torch.full_like(features, 0.25))
    error = (quantizer.project(features) - quantizer.codebook[out.codes]).square().mean(-1)
    torch.testing.assert_close(out.loss, 0.5 * error[mask].mean())
    (gradient,) = torch.autograd.grad(out.loss, features)
    assert (gradient[0, 2] == 0).all()
    assert (gradient[0, 3] != 0).any()


def test_moving_averages() -> None:
    quantizer = make(hidden_layers=0, ema_decay=0.9, revive_below=0.0).train()
    before = quantizer.codebook.clone()
    features = torch.randn(3, 5, 24)
    mask = torch.rand(3, 5) < 0.6
    z, codes = quantizer.project(features)[mask], quantizer(features, mask).codes[mask]
    assert torch.equal(quantizer.codebook, before)
    quantizer.update_codebook()
    for code in range(16):
        mine = z[codes == code]
        count = 0.9 + 0.1 * len(mine)
        expected = (0.9 * before[code] + 0.1 * mine.sum(0)) / count
        torch.testing.assert_close(quantizer.codebook[code], expected)
        torch.testing.assert_close(quantizer.ema_count[code], torch.tensor(count))


def test_batches_of_a_step_count_as_one() -> None:
    one, other = (make(hidden_layers=0, revive_below=0.0).train() for _ in range(2))
    other.load_state_dict(one.state_dict())
    features, mask = torch.randn(4, 5, 24), torch.rand(4, 5) < 0.6
    one(features, mask)
    for rows in (slice(0, 1), slice(1, 4)):
        other(features[rows], mask[rows])
    for quantizer in (one, other):
        quantizer.update_codebook()
    torch.testing.assert_close(other.codebook, one.codebook)
    assert not torch.equal(one.codebook, make(hidden_layers=0).codebook)


def test_revived_codes_are_drawn_from_all_batches_of_a_step_by_their_vectors() -> None:
    quantizer = make(codebook_size=4000, hidden_layers=0, revive_below=2.0).train()
    first, second = torch.full((1, 1, 24), 10.0), torch.full((1, 3, 24), -10.0)
    quantizer(first)
    quantizer(torch.randn(1, 2, 24), torch.zeros(1, 2, dtype=torch.bool))
    quantizer(second)
    quantizer.update_codebook()
    share = (quantizer.codebook[:, 0] > 5).float().mean()
    assert 0.2 < share < 0.3  # one vector of four
    assert (quantizer.codebook.abs() > 5).all()


def test_dead_codes_come_back_on_valid_vectors() -> None:
    quantizer = make(hidden_layers=0, revive_below=0.5).train()
    quantizer.ema_count[3:7] = 0.1
    features = torch.randn(2, 6, 24)
    features[:, 4:] = 1e3
    mask = torch.arange(6).expand(2, 6) < 4
    quantizer(features, mask)
    quantizer.update_codebook()
    valid = quantizer.project(features)[mask]
    distance = torch.cdist(quantizer.codebook[3:7], valid).amin(1)
    assert (distance < 1e-5).all()
    assert (quantizer.ema_count >= 0.5).all()


def test_nothing_moves_without_valid_rows_or_without_training() -> None:
    quantizer = make(hidden_layers=0, revive_below=0.5).train()
    quantizer.ema_count[3] = 0.1
    quantizer.ema_sum[3] *= 0.1
    before, features = quantizer.codebook.clone(), torch.randn(1, 6, 24)
    quantizer(features, torch.zeros(1, 6, dtype=torch.bool))
    quantizer.update_codebook()
    torch.testing.assert_close(quantizer.codebook, before)
    before = quantizer.codebook.clone()
    with torch.no_grad():
        quantizer(features)
    quantizer.eval()(features)
    quantizer.update_codebook()
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("count", [1, 5, 100])
def test_init_codebook(count: int) -> None:
    quantizer, vectors = make(), torch.randn(count, 6) + 5
    quantizer.init_codebook(vectors, torch.Generator().manual_seed(3))
    first = quantizer.codebook.clone()
    assert (torch.cdist(first, vectors).amin(1) < 0.2).all()
    torch.testing.assert_close(quantizer.ema_sum / quantizer.ema_count[:, None], first)
    quantizer.init_codebook(vectors, torch.Generator().manual_seed(3))
    assert torch.equal(quantizer.codebook, first)


@pytest.mark.parametrize("shape", [(0, 6), (4, 5), (2, 3, 6)])
def test_init_codebook_refuses(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="cannot start a codebook"):
        make().init_codebook(torch.zeros(shape))


def test_usage() -> None:
    share, perplexity = usage(torch.tensor([5, 5, 0, 5, 5]))
    assert share == pytest.approx(0.8)
    assert perplexity == pytest.approx(4.0)
    assert usage(torch.tensor([0, 7])) == pytest.approx((0.5, 1.0))
