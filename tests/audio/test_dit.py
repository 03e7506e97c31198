"""The DiT: the published formulas, chunk causality, the cache, published names."""

import math

import pytest
import torch
import torch.nn.functional as F

from kimi_mm.audio.detokenizer_config import DiTConfig, kimi_audio_detokenizer
from kimi_mm.audio.dit import CLEAN, DiT, chunk_mask
from kimi_mm.audio.dit_cache import DiTCache
from kimi_mm.audio.key_maps import PREFIX, dit_from_published, dit_to_published
from kimi_mm.errors import CheckpointError

BINS, FRAMES = 6, 4
PUBLISHED = DiTConfig(
    hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, codebook_size=10, time_size=16, context_frames=24
)
NANO = PUBLISHED.replace(modulation_rank=8, frame_phase=True, condition_input=True, integer_time=False)


def make(config: DiTConfig) -> DiT:
    torch.manual_seed(0)
    dit = DiT(config, BINS, FRAMES).eval().double()
    for parameter in dit.parameters():  # the zeros it starts with would hide everything
        torch.nn.init.normal_(parameter, std=0.25)
    return dit


def time(value: float) -> torch.Tensor:
    return torch.full((1, 1), value)


def published_velocity(w: dict, x: torch.Tensor, t: float, codes: torch.Tensor) -> torch.Tensor:
    """The published forward pass for one chunk without a past, written out again; x [T, M], codes [N]."""
    heads, size = PUBLISHED.num_heads, PUBLISHED.hidden_size // PUBLISHED.num_heads

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    half = PUBLISHED.time_size // 2
    angle = int(t * 1000) * torch.exp(-math.log(10_000) * torch.arange(half).double() / half)
    embedded = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()]))))
    c = embedded + w["semantic_token_embedding.weight"][codes].repeat_interleave(FRAMES, 0)
    h = linear("input_linear", x)
    turn = torch.arange(len(x)).double()[:, None] * 10_000.0 ** (-torch.arange(0, size, 2).double() / size)
    turn = torch.polar(torch.ones_like(turn), turn)
    for i in range(PUBLISHED.num_layers):
        name = f"blocks.{i}."
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(name + "adaLN_modulation.1", F.silu(c)).chunk(6, -1)
        q, k, v = linear(name + "attn.qkv", norm(h) * (1 + scale_a) + shift_a).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, size)).transpose(0, 1) for part in (q, k, v))
        q, k = (torch.view_as_real(torch.view_as_complex(p.unflatten(-1, (-1, 2))) * turn).flatten(-2) for p in (q, k))
        heard = (q @ k.transpose(-1, -2) / math.sqrt(size)).softmax(-1) @ v
        h = h + gate_a * linear(name + "attn.proj", heard.transpose(0, 1).flatten(1))
        inner = F.gelu(linear(name + "mlp.fc1", norm(h) * (1 + scale_m) + shift_m), approximate="tanh")
        h = h + gate_m * linear(name + "mlp.fc2", inner)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, -1)
    return linear("final_layer.linear", norm(h) * (1 + scale) + shift)


def norm(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def test_forward_is_the_published_one():
    dit = make(PUBLISHED)
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in dit_to_published(dit).items()}
    x, codes = torch.randn(12, BINS).double(), torch.tensor([3, 3, 10])
    context = dit.context(empty(dit), [12])
    for t in (0.0, 0.5177, CLEAN):
        ours = dit(x[None], time(t), dit.condition(codes[None]), context)[0]
        assert torch.allclose(ours, published_velocity(weights, x, t, codes), atol=1e-3)


def empty(dit: DiT, rows: int = 1) -> DiTCache:
    return dit.empty_cache(rows)


@pytest.mark.parametrize("config", [PUBLISHED, NANO], ids=["published", "nano"])
def test_training_pass_equals_streaming(config):
    """All chunks at once under the mask against one after the other with a cache: velocities are the same."""
    dit = make(config)
    sizes = [4, 8, 4, 8]
    total = sum(sizes)
    clean, noisy = torch.randn(2, total, BINS).double(), torch.randn(2, total, BINS).double()
    codes = torch.randint(0, 10, (2, total // FRAMES))
    chunks = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    times = torch.rand(2, len(sizes))[:, chunks]
    cond = dit.condition(codes)
    both_times = torch.cat([times, torch.full_like(times, CLEAN)], 1)
    context = dit.chunk_context(chunks)
    whole = dit(torch.cat([noisy, clean], 1), both_times, cond.repeat(1, 2, 1), context)[:, :total]
    cache, at = empty(dit, 2), 0
    for size in sizes:
        cut = slice(at, at + size)
        context = dit.context(cache, [size, size])
        part = dit(noisy[:, cut], times[:, cut], cond[:, cut], context)
        assert torch.allclose(part, whole[:, cut], atol=1e-5)
        keys, values = dit.keys_values(clean[:, cut], cond[:, cut], context)
        cache = cache.extended(keys, values, [size, size], 100)
        at += size


def test_mask_shows_finished_chunks_only():
    mask = chunk_mask(torch.tensor([0, 0, 1]))
    noisy_then_clean = [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    assert mask.int().tolist() == noisy_then_clean


def test_rows_of_different_length_equal_rows_alone():
    dit = make(NANO)
    pasts = [0, 8, 20]
    counts = [4, 12, 8]
    caches = []
    for past in pasts:
        cache = empty(dit)
        if past:
            x, codes = torch.randn(1, past, BINS).double(), torch.randint(0, 10, (1, past // FRAMES))
            keys, values = dit.keys_values(x, dit.condition(codes), dit.context(cache, [past]))
            cache = cache.extended(keys, values, [past], 24)
        caches.append(cache)
    x, codes = torch.randn(3, 12, BINS).double(), torch.randint(0, 10, (3, 3))
    cond = dit.condition(codes)
    together = dit(x, time(0.4), cond, dit.context(DiTCache.stack(caches), counts))
    for row, count in enumerate(counts):
        alone = dit(x[row : row + 1, :count], time(0.4), cond[row : row + 1, :count], dit.context(caches[row], [count]))
        assert torch.allclose(together[row, :count], alone[0], atol=1e-6)
    again = DiTCache.stack(caches).row(1)
    assert torch.equal(again.keys, caches[1].keys)


def test_cache_forgets_the_oldest_but_not_the_prompt():
    dit = make(NANO)
    cache = empty(dit)
    frames = torch.arange(40.0).double()

    def extended(cache: DiTCache, first: int, last: int) -> DiTCache:
        marked = frames[first:last].reshape(1, 1, 1, -1, 1).expand(2, 1, 2, -1, 16)
        return cache.extended(marked, marked, [last - first], 24)

    cache = extended(cache, 0, 8).protected()
    cache = extended(cache, 8, 20)
    assert (cache.lengths, cache.prompts) == ((20,), (8,))
    cache = extended(extended(cache, 20, 32), 32, 36)
    assert cache.keys[0, 0, 0, :, 0].tolist() == [*range(8), *range(20, 36)]


def test_a_past_beyond_the_window_changes_nothing():
    dit = make(NANO)
    x, codes = torch.randn(1, 60, BINS).double(), torch.randint(0, 10, (1, 15))
    cond = dit.condition(codes)

    def last(first: int) -> torch.Tensor:
        cache = empty(dit)
        marks = torch.randn(2, 1, 2, 60, 16, generator=torch.Generator().manual_seed(1)).double()
        for at in range(first, 56, 4):
            cache = cache.extended(marks[:, :, :, at : at + 4], marks[:, :, :, at : at + 4], [4], 24)
        return dit(x[:, 56:], time(0.2), cond[:, 56:], dit.context(cache, [4]))

    assert torch.allclose(last(0), last(32), atol=1e-9)
    assert not torch.allclose(last(0), last(40), atol=1e-3)


def test_published_size_and_names():
    with torch.device("meta"):
        dit = DiT(kimi_audio_detokenizer().dit, 80)
    published = dit_to_published(dit)
    assert len(published) == 171
    assert sum(t.numel() for t in published.values()) == 1_584_023_120
    assert published[PREFIX + "semantic_token_embedding.weight"].shape == (16_385, 2304)
    assert published[PREFIX + "blocks.15.adaLN_modulation.1.weight"].shape == (13_824, 2304)
    assert published[PREFIX + "final_layer.linear.weight"].shape == (80, 2304)


def test_published_checkpoint_is_read():
    dit = make(PUBLISHED)
    published = dit_to_published(dit)
    twin = DiT(PUBLISHED, BINS, FRAMES)
    twin.load_state_dict(dit_from_published(twin, {**published, "resampler.kernel": torch.zeros(1)}))
    assert all(torch.equal(a, b.float()) for a, b in zip(twin.parameters(), dit.parameters(), strict=True))
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'input_linear\.bias'"):
        dit_from_published(dit, {k: v for k, v in published.items() if not k.endswith("input_linear.bias")})
    with pytest.raises(CheckpointError, match="has no published layout"):
        dit_to_published(make(NANO))


def test_time_is_cut_to_thousandths_as_published():
    dit = make(PUBLISHED)
    table = [dit._sinusoids(torch.tensor(k / 29)) for k in (0, 1, 2, 3, 28)]
    half = torch.exp(torch.arange(8) * (-math.log(10_000.0) / 8))
    for row, step in zip(table, (0, 34, 68, 103, 965), strict=True):
        assert torch.allclose(row, torch.cat([(step * half).cos(), (step * half).sin()]), atol=1e-5)
    assert torch.equal(dit._sinusoids(torch.tensor(CLEAN)), dit._sinusoids(torch.tensor(0.9995)))
