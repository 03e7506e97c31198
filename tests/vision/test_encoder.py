"""The tower: packing, order, time, sizes of the presets, and a sentence for what does not fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kimi_mm.config import ConfigError, ModelConfig, VisionConfig, VisionTowerConfig
from kimi_mm.errors import UserError
from kimi_mm.vision.encoder import VisionEncoder, attend, plan_layout, resample, time_rows
from kimi_mm.vision.presets import PRESETS, vision_preset
from kimi_mm.vision.projector import merge_cells
from tests.vision.tiny import EYES, GRIDS, TOWER, patches, shaken

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    torch.manual_seed(0)
    return shaken(VisionEncoder(EYES))  # type: ignore[return-value]


def test_packed_equals_alone(encoder):
    pixels = patches(GRIDS)
    with torch.no_grad():
        packed = encoder(pixels, torch.tensor(GRIDS))
        pieces = pixels.split([t * h * w for t, h, w in GRIDS])
        for grid, piece, rows in zip(GRIDS, pieces, packed, strict=True):
            (alone,) = encoder(piece, [grid])
            assert rows.shape == (grid[1] * grid[2] // 4, 32)
            assert rows.std() > 0.3
            torch.testing.assert_close(rows, alone, atol=1e-5, rtol=1e-5)


def test_order_of_items_does_not_matter(encoder):
    pixels = patches(GRIDS)
    pieces = pixels.split([t * h * w for t, h, w in GRIDS])
    turned = list(reversed(range(len(GRIDS))))
    with torch.no_grad():
        rows = encoder(pixels, GRIDS)
        back = encoder(torch.cat([pieces[i] for i in turned]), [GRIDS[i] for i in turned])
    for i, other in zip(turned, back, strict=True):
        torch.testing.assert_close(rows[i], other, atol=1e-5, rtol=1e-5)


def test_gradients_reach_everything_and_equal_those_alone(encoder):
    grids = GRIDS[:4]
    pixels = patches(grids)
    weights = [torch.randn(h * w // 4, 32, generator=torch.Generator().manual_seed(7)) for _, h, w in grids]

    def gradients(batches):
        encoder.zero_grad()
        for piece, some, their in batches:
            rows = encoder(piece, some)
            sum((row * weight).sum() for row, weight in zip(rows, their, strict=True)).backward()
        return {name: p.grad.clone() for name, p in encoder.named_parameters()}

    pieces = pixels.split([t * h * w for t, h, w in grids])
    together = gradients([(pixels, grids, weights)])
    apart = gradients([(piece, [grid], [w]) for piece, grid, w in zip(pieces, grids, weights, strict=True)])
    for name, gradient in together.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, apart[name], atol=1e-4, rtol=1e-4, msg=name)


def test_attention_equals_a_mask():
    grids = [(1, 2, 4), (2, 2, 2), (1, 2, 4), (1, 6, 2)]
    layout = plan_layout(grids, CPU)
    total = sum(t * h * w for t, h, w in grids)
    q, k, v = torch.randn(3, total, 2, 8).unbind()
    item = torch.cat([torch.full((g.length,), i) for g in layout.groups for i in g.items])
    mask = item[:, None] == item
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    want = F.scaled_dot_product_attention(*heads, attn_mask=mask)[0].transpose(0, 1)
    torch.testing.assert_close(attend(q, k, v, layout), want)


def test_frames_are_told_apart_and_one_frame_is_a_picture(encoder):
    picture = patches([(1, 4, 4)])
    with torch.no_grad():
        (still,) = encoder(picture, [(1, 4, 4)])
        (twice,) = encoder(torch.cat([picture] * 2), [(2, 4, 4)])
        other = patches([(1, 4, 4)], seed=1)
        (forward,) = encoder(torch.cat([picture, other]), [(2, 4, 4)])
        (backward,) = encoder(torch.cat([other, picture]), [(2, 4, 4)])
    assert (still - twice).abs().max() > 1e-2  # several frames get time rows, a picture none
    assert (forward - backward).abs().max() > 1e-3


def test_time_rows():
    rows = time_rows(4, 1152)
    assert rows.shape == (4, 1152)
    torch.testing.assert_close(rows[0], torch.cat([torch.zeros(576), torch.ones(576)]))
    torch.testing.assert_close(
        rows[3, [0, 1, 576]],
        torch.tensor([3.0, 0.0, 3.0])
        .sin()
        .index_put(
            (torch.tensor([1, 2]),),
            torch.stack([torch.tensor(3.0 * 10_000 ** (-1 / 576)).sin(), torch.tensor(3.0).cos()]),
        ),
    )


def test_cells():
    x = torch.arange(2 * 4 * 4.0).view(1, 32, 1)
    cells = merge_cells(x, (2, 4, 4), 2)[0, :, :, 0] - 8  # the mean over two frames adds half of 16
    assert cells.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_memory_is_linear_in_the_patches():
    """No tensor of a forward may hold patches x patches numbers."""
    grid, largest = (1, 64, 64), [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest[0] = max(largest[0], tensor.numel())
            return out

    encoder = VisionEncoder(EYES.replace(tower=TOWER.replace(num_layers=1)))
    with torch.inference_mode(), Watch():
        encoder(patches([grid]), [grid])
    assert 4096 * 588 <= largest[0] < 4096 * 4096 / 4


def test_published_sizes():
    want = {
        "kimi_k25": (416_866_032, 54_277_888),
        "kimi_vl": (416_866_032, 30_679_808),
        "kimi_vl_2506": (416_866_032, 30_679_808),
    }
    for name, sizes in want.items():
        with torch.device("meta"):
            encoder = VisionEncoder(vision_preset(name))
        parts = (encoder.tower, encoder.projector)
        assert tuple(sum(p.numel() for p in part.parameters()) for part in parts) == sizes
    assert PRESETS["kimi_k25"].input.max_patches == PRESETS["kimi_vl_2506"].input.max_patches == 16_384


def test_nano_is_small():
    encoder = VisionEncoder(PRESETS["nano"])
    assert sum(p.numel() for p in encoder.parameters()) < 5e6


@pytest.mark.parametrize(
    ("grids", "count", "words"),
    [
        ([(5, 2, 2)], 20, "item 0: 5 frames; this tower takes 1 to 4"),
        ([(1, 2, 2), (1, 3, 2)], 10, "item 1: a grid of 3x2 patches"),
        ([(1, 2, 2)], 6, r"shape \[6, 3, 14, 14\], the grids need \[4, 3, 14, 14\]"),
    ],
)
def test_what_does_not_fit_is_refused(encoder, grids, count, words):
    with pytest.raises(UserError, match=words):
        encoder(torch.zeros(count, 3, 14, 14), grids)


def test_no_items(encoder):
    assert encoder(torch.zeros(0, 3, 14, 14), []) == []


def test_bad_configs():
    with pytest.raises(ConfigError, match=r"hidden_size=30 must be a multiple of 4 \* num_heads"):
        VisionTowerConfig(hidden_size=30, num_heads=2)
    with pytest.raises(ConfigError, match="patch_size=0 must be above 0"):
        VisionTowerConfig(patch_size=0)
    with pytest.raises(ConfigError, match="alpha='black'"):
        VisionConfig.from_dict({"input": {"alpha": "black"}})
    with pytest.raises(ConfigError, match="did you mean 'kimi_k25'"):
        vision_preset("kimi_k2")
    with pytest.raises(ConfigError, match=r"output_size=7168 differs from backbone\.hidden_size"):
        ModelConfig.from_dict({"vision": {}, "backbone": {"vocab_size": 8192}})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_yaml(name, tmp_path):
    (tmp_path / "vision.yaml").write_text(PRESETS[name].to_yaml())
    assert VisionConfig.from_yaml(tmp_path / "vision.yaml") == PRESETS[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(encoder, dtype):
    with torch.no_grad():
        want = encoder(patches(GRIDS), GRIDS)
        got = VisionEncoder(EYES).to(dtype)
        got.load_state_dict(encoder.state_dict())
        rows = got(patches(GRIDS), GRIDS)
    for a, b in zip(rows, want, strict=True):
        assert a.dtype == dtype
        assert ((a.float() - b).norm() / b.norm()) < 0.03


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("grids", [GRIDS, [(1, 8, 8)] * 3])
def test_gpu_equals_cpu(encoder, grids):
    """Many grids go through variable-length flash attention in 16 bits, equal ones through one batched call."""
    want = encoder(patches(grids), grids)
    device = VisionEncoder(EYES)
    device.load_state_dict(encoder.state_dict())
    device = device.cuda()
    with torch.no_grad():
        for a, b in zip(device(patches(grids).cuda(), grids), want, strict=True):
            torch.testing.assert_close(a.cpu(), b, atol=1e-3, rtol=1e-3)
        device = device.bfloat16()
        for a, b in zip(device(patches(grids).cuda(), grids), want, strict=True):
            assert ((a.cpu().float() - b).norm() / b.norm()) < 0.03


def test_resampled_tables_and_their_gradient_are_those_of_interpolate():
    generator = torch.Generator().manual_seed(3)
    sizes = [(14, 56), (64, 16), (2, 2), (12, 10), (90, 34), (24, 10)]
    table = torch.randn(12, 10, 8, generator=generator, requires_grad=True)
    ours = resample(table, sizes)
    want = [F.interpolate(table.permute(2, 0, 1)[None], size, mode="bicubic")[0].permute(1, 2, 0) for size in sizes]
    for got, expected in zip(ours, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    pull = [torch.randn(x.shape, generator=generator) for x in want]
    (slope,), (expected,) = (torch.autograd.grad(tables, table, pull) for tables in (ours, want))
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert resample(table, [(12, 10)])[0] is table


def test_tables_in_sixteen_bits_are_rounded_once():
    table = torch.randn(12, 10, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    exact = F.interpolate(table.double().permute(2, 0, 1)[None], (14, 22), mode="bicubic")[0].permute(1, 2, 0)
    (ours,) = resample(table, [(14, 22)])
    assert ours.dtype == torch.bfloat16
    assert (ours == exact.bfloat16()).float().mean() > 0.99
