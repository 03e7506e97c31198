"""The backbone as a whole: cached, packed and ragged calls equal each row alone; streams, embedding, balancing."""

import io
import math

import pytest
import torch

from kimi_mm.config import BackboneConfig, GQAConfig, KDAConfig, MLAConfig, MoEConfig, RopeConfig
from kimi_mm.errors import CheckpointError
from kimi_mm.text.backbone import Backbone

YARN = RopeConfig(interleaved=True, yarn_factor=4.0, yarn_mscale_all_dim=1.0)


def _config(**changes) -> BackboneConfig:
    base = BackboneConfig(
        vocab_size=53,
        hidden_size=32,
        trunk=("kda/dense", "gqa/moe", "kda/moe"),
        text_branch=("mla/moe",),
        audio_branch=("kda/moe",),
        audio_head=True,
        intermediate_size=48,
        adaptor_input_size=12,
        kda=KDAConfig(num_heads=2, num_value_heads=4, head_dim=8, value_head_dim=12, output_gate_bias=True),
        mla=MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12),
        gqa=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8),
        moe=MoEConfig(intermediate_size=16),
    )
    return base.replace(**changes)


CONFIGS = {
    "attn_res": {},
    "full_attn_res": {"attn_res_block_size": 1},
    "plain_rope": {
        "residual": "plain",
        "mla": MLAConfig(
            num_heads=2, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, rope=YARN
        ),
        "kda": KDAConfig(num_heads=2, head_dim=8, gate="softplus"),
    },
    "branches_only": {"trunk": (), "text_branch": ("kda/dense", "mla/moe"), "audio_branch": ("gqa/dense",)},
}


def _model(**changes) -> Backbone:
    torch.manual_seed(0)
    model = Backbone(_config(**changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    return _model(**CONFIGS[request.param])


def _embed(model, B, T):
    generator = torch.Generator().manual_seed(3)
    text, audio = (torch.randint(0, 53, (B, T), generator=generator) for _ in range(2))
    features = torch.randn(B, T, 12, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return model.embed(text, audio, features, torch.rand(B, T, generator=generator) < 0.3)


def _both(out):
    return torch.cat([out.text_hidden, out.audio_hidden], -1)


@torch.no_grad()
def test_pieces_equal_whole(model):
    x = _embed(model, 2, 40)
    want = _both(model(x))
    for sizes in ([1] * 40, [17, 1, 1, 20, 1], [39, 1]):
        cache = model.new_cache(2)
        got = torch.cat([_both(model(piece, cache=cache)) for piece in x.split(sizes, 1)], 1)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        assert cache.lengths.tolist() == [40, 40]


@torch.no_grad()
def test_ragged_batch_equals_each_row_alone(model):
    """Right-padded prefill, decoding at different lengths, a second padded piece, and one more token."""
    first, second = torch.tensor([23, 1, 9]), torch.tensor([2, 5, 3])
    x = _embed(model, 3, 40)
    rows = [torch.cat([x[b, : first[b]], x[b, 23:27], x[b, 27 : 27 + second[b]], x[b, 32:33]]) for b in range(3)]
    alone = [_both(model(row[None]))[0] for row in rows]
    cache = model.new_cache(3)
    outs = [model(x[:, :23], lengths=first, cache=cache)]
    outs += [model(x[:, t : t + 1], cache=cache) for t in range(23, 27)]
    outs += [model(x[:, 27:32], lengths=second, cache=cache), model(x[:, 32:33], cache=cache)]
    valid = [first, *[torch.ones(3, dtype=torch.int64)] * 4, second, torch.ones(3, dtype=torch.int64)]
    for b in range(3):
        got = torch.cat([_both(out)[b, : count[b]] for out, count in zip(outs, valid, strict=True)])
        torch.testing.assert_close(got, alone[b], rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_packed_equals_alone(model):
    sizes = [5, 19, 0, 1, 8]
    x = _embed(model, 1, sum(sizes))
    got = _both(model(x, cu_seqlens=torch.tensor([0, 5, 24, 24, 25, 33], dtype=torch.int32)))
    want = torch.cat([_both(model(piece)) for piece in x.split(sizes, 1) if piece.shape[1]], 1)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_cache_copies_selects_and_saves(model):
    x = _embed(model, 3, 14)
    cache = model.new_cache(3)
    model(x[:, :12], lengths=torch.tensor([12, 7, 3]), cache=cache)
    before = cache.clone()
    want = _both(model(x[:, 12:13], cache=cache))
    picked = before.select([2, 0, 2])
    got = _both(model(x[[2, 0, 2], 12:13], cache=picked))
    torch.testing.assert_close(got, want[[2, 0, 2]], rtol=1e-10, atol=1e-12)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    loaded = model.new_cache(3)
    loaded.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(_both(model(x[:, 12:13], cache=loaded.to("cpu"))), _both(model(x[:, 12:13], cache=before)))


def test_a_saved_cache_outlives_decoding(model):
    """One-token steps change the state in place; a state dict, and what was loaded from it, must not follow."""
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    cache = model.new_cache(2)
    model(x[:, :7], cache=cache)
    saved = cache.state_dict()
    want = _both(model(x[:, 7:8], cache=cache))
    for _ in range(2):
        loaded = model.new_cache(2)
        loaded.load_state_dict(saved)
        assert torch.equal(_both(model(x[:, 7:8], cache=loaded)), want)


def test_every_parameter_gets_a_gradient(model):
    model.zero_grad()
    out = model(_embed_with_grad(model))
    # every expert must be picked somewhere, so the batch is large
    (model.text_logits(out.text_hidden).square().sum() + model.audio_logits(out.audio_hidden).square().sum()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.zero_grad()
    assert missing == []


def _embed_with_grad(model):
    generator = torch.Generator().manual_seed(4)
    text, audio = (torch.randint(0, 53, (4, 30), generator=generator) for _ in range(2))
    features = torch.randn(4, 30, 12, generator=generator, dtype=torch.float64)
    return model.embed(text, audio, features, torch.rand(4, 30, generator=generator) < 0.5)


@torch.no_grad()
def test_embed_follows_the_formula():
    model = _model()
    text, audio = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])
    features, mask = torch.randn(1, 3, 12, dtype=torch.float64), torch.tensor([[False, True, False]])
    table = model.embed_tokens.weight
    got = model.embed(text, audio, features, mask)
    assert torch.equal(got[0, 0], table[4] + table[1])
    fused = (table[5] + model.adaptor(features)[0, 1]) * math.sqrt(2)
    torch.testing.assert_close(got[0, 1], fused + table[2])
    assert torch.equal(model.embed(text), table[text])
    with pytest.raises(ValueError, match="adaptor_input_size"):
        model.embed(text, features=features, feature_mask=mask)


@torch.no_grad()
def test_block_attention_residuals_follow_the_paper():
    """Dense layers only: the stream against a literal reading of Attention Residuals, section 4."""
    model = _model(trunk=("gqa/dense",) * 3, text_branch=("gqa/dense",), audio_branch=("gqa/dense",) * 2)
    x = _embed(model, 1, 6)

    def mix(sources, module):
        V = torch.stack(sources)
        keys = V * (V.square().mean(-1, keepdim=True) + module.eps).rsqrt() * module.norm_weight
        return (torch.softmax((keys @ module.query), 0)[..., None] * V).sum(0)

    from kimi_mm.text.attention import plan_step

    step = plan_step(x, None, None, None, None)
    for branch, name in ((model.text, "text_hidden"), (model.audio, "audio_hidden")):
        outputs = []  # of all sublayers on this path
        for layer in [*model.trunk, *branch.layers]:
            for kind in ("mixer", "mlp"):
                full = len(outputs) // 4 * 4
                blocks = [x, *(sum(outputs[i : i + 4]) for i in range(0, full, 4))]
                sources = blocks if len(outputs) == full else [*blocks, sum(outputs[full:])]
                module = getattr(layer, f"{kind}_mix")
                h = getattr(layer, f"{kind}_norm")(sources[0] if module is None else mix(sources, module))
                outputs.append(layer.mixer(h, step) if kind == "mixer" else layer.mlp(h))
        sources = [x, *(sum(outputs[i : i + 4]) for i in range(0, len(outputs), 4))]
        want = branch.norm(mix(sources, branch.mix))
        torch.testing.assert_close(getattr(model(x), name), want, rtol=1e-10, atol=1e-12)


def test_expert_balancing_counts_valid_tokens_and_moves_the_bias():
    model = _model(trunk=("gqa/moe",), text_branch=(), audio_branch=(), audio_head=False).train()
    router = model.trunk[0].mlp.router
    x = _embed(model, 2, 10)
    model(x, lengths=torch.tensor([10, 4]))
    assert int(router.load.sum()) == 14 * 2
    load = router.load.clone()
    model.update_expert_bias()
    torch.testing.assert_close(router.bias, 1e-3 * torch.sign(load.mean() - load).to(router.bias))
    assert not router.load.any()
    with torch.no_grad():
        model.eval()(x)
    assert not router.load.any()


def test_half_precision_keeps_the_router_state_exact():
    model = _model(trunk=("kda/moe",), text_branch=(), audio_branch=())
    model.trunk[0].mlp.router.bias += 0.123456789
    kept = model.trunk[0].mlp.router.bias.clone()
    model.bfloat16()
    assert torch.equal(model.trunk[0].mlp.router.bias, kept)
    x = model.embed(torch.tensor([[1, 2, 3]]))
    cache = model.new_cache(1)
    assert model(x, cache=cache).text_hidden.dtype == torch.bfloat16
    assert model(x[:, :1], cache=cache).audio_hidden.dtype == torch.bfloat16
    assert cache.layers[0].recurrent.dtype == torch.float32


def test_initialisation():
    model = Backbone(_config(hidden_size=64, kda=KDAConfig(num_heads=4, head_dim=64, gate="softplus")))
    kda = model.trunk[0].mixer
    assert 0.019 < kda.q_proj.weight.std() < 0.021
    assert 1.0 <= kda.A_log.exp().min() <= kda.A_log.exp().max() <= 16.0
    dt = torch.nn.functional.softplus(kda.dt_bias)
    assert 9e-4 < dt.min() < 2e-3 < 5e-2 < dt.max() < 0.101
    assert not model.text.mix.query.any()
    assert not model.trunk[1].mixer.q_proj.bias.any()


def test_tied_heads_read_the_table():
    model = _model(tie_word_embeddings=True)
    hidden = torch.randn(2, 32, dtype=torch.float64)
    assert torch.equal(model.text_logits(hidden), hidden @ model.embed_tokens.weight.t())
    assert torch.equal(model.audio_logits(hidden), model.text_logits(hidden))
    assert not any("head" in name for name, _ in model.named_parameters())


def test_contradictory_calls_are_refused():
    model = _model()
    x = _embed(model, 2, 4)
    with pytest.raises(ValueError, match="excludes a cache"):
        model(x[:1], cu_seqlens=torch.tensor([0, 4]), cache=model.new_cache(1))
    with pytest.raises(ValueError, match="The cache holds 3 rows"):
        model(x, cache=model.new_cache(3))
    other = _model(trunk=(), text_branch=("mla/dense",), audio_branch=())
    with pytest.raises(CheckpointError, match=r"layers\.0\.conv"):
        model.new_cache(1).load_state_dict(other.new_cache(1).state_dict())


def test_rows_join_and_leave_a_running_batch(model):
    """Three rows that start at different times, share steps, and leave early each get what they get alone."""
    x = torch.randn(3, 40, 32, dtype=torch.float64)
    alone = []
    for row in range(3):
        cache = model.new_cache(1)
        alone.append(torch.cat([_both(model(piece, cache=cache)) for piece in x[row, None].split(1, 1)], 1)[0])

    def started(row: int, tokens: int):
        cache = model.new_cache(1)
        model(x[row, None, :tokens], lengths=torch.tensor([tokens]), cache=cache)
        return cache

    held = [20, 5, 11]
    batch = type(started(0, 1)).join([started(0, 18)])
    for at in (18, 19):
        model(x[0, None, at : at + 1], cache=batch)
    batch = type(batch).join([batch, started(1, held[1]), started(2, held[2])])
    rows = [0, 1, 2]
    for step in range(12):
        if step == 4:  # the longest one leaves
            rows = [2, 1]
            batch = batch.select([2, 1]).trim(max(held[1], held[2]))
            assert batch.max_length == held[2]
        new = torch.stack([x[row, held[row]] for row in rows])[:, None]
        out = _both(model(new, cache=batch))[:, 0]
        for slot, row in enumerate(rows):
            torch.testing.assert_close(out[slot], alone[row][held[row]])
            held[row] += 1
    assert batch.lengths.tolist() == [held[2], held[1]]
    assert batch.trim(99) is batch
    assert type(batch).join([batch]) is batch


def test_caches_of_different_models_do_not_join(model):
    other = _model(trunk=("gqa/dense",), text_branch=("gqa/dense",), audio_branch=("gqa/dense",))
    with pytest.raises(ValueError, match=r"different models|zip"):
        model.new_cache(1).join([model.new_cache(1), other.new_cache(1)])
    with pytest.raises(ValueError, match="no caches"):
        model.new_cache(1).join([])


def test_a_cache_for_text_alone_runs_no_audio_branch():
    model = _model()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    both, alone = model.new_cache(2), model.new_cache(2, audio=False)
    assert len(alone.layers) == len(both.layers) - len(model.config.audio_branch)
    for part in x.split([4, 1, 2], 1):
        want, got = model(part, cache=both), model(part, cache=alone)
        assert want.audio_hidden is not None
        assert got.audio_hidden is None
        assert torch.equal(got.text_hidden, want.text_hidden)
