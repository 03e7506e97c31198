"""Our backbone with copied weights gives the logits of transformers' own models, in fp32, prefill and cached."""

import pytest
import torch

from kimi_mm.errors import CheckpointError
from kimi_mm.text.backbone import Backbone
from kimi_mm.text.key_maps import backbone_config, from_transformers, to_transformers

transformers = pytest.importorskip("transformers")

MLA = {
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
COMMON = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "pad_token_id": 0, "num_hidden_layers": 3}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}


def _kimi_linear(**changes):
    values = (
        COMMON
        | MLA
        | {
            "q_lora_rank": None,
            "moe_intermediate_size": 24,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "linear_head_dim": 16,
            "linear_num_heads": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        }
    )
    return transformers.KimiLinearForCausalLM(transformers.KimiLinearConfig(**values | changes))


def _deepseek(**changes):
    values = (
        COMMON
        | MLA
        | {
            "q_lora_rank": 20,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "num_mtp_layers": 0,
        }
    )
    config = transformers.DeepseekV3Config(**values | changes)
    return transformers.DeepseekV3ForCausalLM(config)


def _qwen2(tie: bool):
    config = transformers.Qwen2Config(
        **COMMON, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tie, rope_theta=1e6
    )
    return transformers.Qwen2ForCausalLM(config)


MODELS = {
    "kimi_linear": ("kimi_linear", _kimi_linear),
    "deepseek": ("deepseek_v3", _deepseek),
    "deepseek_yarn": ("deepseek_v3", lambda: _deepseek(rope_parameters=dict(YARN), max_position_embeddings=256)),
    "deepseek_halves": ("deepseek_v3", lambda: _deepseek(rope_interleave=False)),
    "qwen2": ("qwen2", lambda: _qwen2(False)),
    "qwen2_tied": ("qwen2", lambda: _qwen2(True)),
}


@pytest.fixture(params=MODELS, scope="module")
def pair(request):
    """(theirs, ours), with every parameter and buffer far from its initial value."""
    torch.manual_seed(0)
    model_type, make = MODELS[request.param]
    theirs = make().float().eval()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            tensor.add_(torch.randn_like(tensor) * (0.3 if tensor.dim() == 1 or "A_log" in name else 0.15))
    theirs.tie_weights()
    config = backbone_config(model_type, theirs.config.to_dict())
    ours = Backbone(config).eval()
    ours.load_state_dict(from_transformers(theirs.state_dict(), config))
    return theirs, ours


def test_logits(pair):
    theirs, ours = pair
    ids = torch.randint(1, 61, (2, 83))
    with torch.no_grad():
        want = theirs(ids).logits
        got = ours.text_logits(ours(ours.embed(ids)).text_hidden)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, atol=1e-5 * want.abs().max().item(), rtol=0.0)


def test_cached_decoding(pair):
    theirs, ours = pair
    ids = torch.randint(1, 61, (2, 40))
    with torch.no_grad():
        want = theirs(ids).logits
        cache = ours.new_cache(2)
        pieces = [ids[:, :19], ids[:, 19:26], *ids[:, 26:].split(1, 1)]
        got = torch.cat([ours.text_logits(ours(ours.embed(p), cache=cache).text_hidden) for p in pieces], 1)
    # The order of summation is not that of the chunk form.
    torch.testing.assert_close(got, want, atol=2e-5 * want.abs().max().item(), rtol=0.0)


def test_key_map_round_trip(pair):
    theirs, ours = pair
    back = to_transformers(ours.state_dict(), ours.config)
    want = theirs.state_dict()
    if ours.config.tie_word_embeddings:
        want.pop("lm_head.weight")
    assert back.keys() == want.keys()
    for key, tensor in want.items():
        assert torch.equal(back[key], tensor), key


def test_trunk_and_branch_split():
    ours = Backbone(backbone_config("qwen2", _qwen2(False).config.to_dict()))
    split = ours.config.replace(trunk=("gqa/dense",), text_branch=("gqa/dense",) * 2)
    moved = from_transformers(to_transformers(ours.state_dict(), ours.config), split)
    Backbone(split).load_state_dict(moved)
    assert torch.equal(moved["text.layers.1.mlp.up_proj.weight"], ours.state_dict()["trunk.2.mlp.up_proj.weight"])


def test_unknown_key_is_named():
    config = backbone_config("qwen2", _qwen2(False).config.to_dict())
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.rotary"):
        from_transformers({"model.layers.0.self_attn.rotary": torch.zeros(1)}, config)
    with pytest.raises(CheckpointError, match="llama"):
        backbone_config("llama", {})
