"""Tiny random models in the published layout, on disk, through convert and load: the results of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kimi_mm
from kimi_mm.conversion.convert import convert
from kimi_mm.processing import ModelInputs
from tests.conversion.tiny import KIMI_AUDIO, kimi_audio, write_vocabulary
from tests.text.test_parity import _deepseek, _kimi_linear, _qwen2
from tests.vision.test_parity import TEXT, VISION
from tests.vision.tiny import patches, shaken

transformers = pytest.importorskip("transformers")


def text_inputs(ids: torch.Tensor) -> ModelInputs:
    return ModelInputs(ids, ids, torch.full((len(ids),), ids.shape[1]))


# transformers keeps some arithmetic in fp32 when all else is float64: norms everywhere, the router (experts), and the
# recurrence (kda).
EXACT = {
    "gqa": (lambda: _qwen2(False), 1e-6),
    "mla": (lambda: _deepseek(first_k_dense_replace=3), 1e-6),
    "mla, experts": (_deepseek, 5e-6),
    "mla without positions": (
        lambda: _kimi_linear(layer_types=["full_attention"] * 3, mlp_layer_types=["dense"] * 3),
        3e-6,
    ),
    "kda, experts": (_kimi_linear, 3e-5),
}


@pytest.mark.parametrize("kind", EXACT)
def test_text_logits(kind, tmp_path):
    make, tolerance = EXACT[kind]
    torch.manual_seed(0)
    theirs = shaken(make()).double().eval()
    theirs.config._experts_implementation = "eager"  # grouped matmul has no float64
    theirs.save_pretrained(tmp_path / "published")
    write_vocabulary(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "ours", shard_bytes=100_000)
    ids = torch.randint(1, 61, (2, 83))
    for folder in ("published", "ours"):
        ours = kimi_mm.load(tmp_path / folder, dtype=torch.float64).model
        with torch.no_grad():
            want = theirs(ids).logits
            got = ours.backbone.text_logits(ours(text_inputs(ids)).text_hidden)
        assert want.std() > 0.05
        torch.testing.assert_close(got, want, atol=tolerance, rtol=1e-6)


def test_kimi_k25_with_a_picture(tmp_path):
    """Text and vision from one folder: logits behind a picture whose rows stand at the pads."""
    from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25ForConditionalGeneration

    torch.manual_seed(0)
    config = transformers.Kimi_K25Config(
        text_config=TEXT | {"tie_word_embeddings": False, "num_mtp_layers": 0},
        vision_config=VISION,
        projection_hidden_size=48,
        image_token_id=1,
        video_token_id=2,
        tie_word_embeddings=False,
    )
    theirs = shaken(Kimi_K25ForConditionalGeneration(config)).float().eval()
    theirs.save_pretrained(tmp_path / "published")
    write_vocabulary(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "ours")
    ours = kimi_mm.load(tmp_path / "ours").model
    grid, pixels = torch.tensor([[1, 4, 6]]), patches([(1, 4, 6)])
    ids = torch.randint(3, 60, (1, 30))
    ids[0, 5:11] = 1
    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=pixels, image_grid_thw=grid).logits
        inputs = text_inputs(ids)
        inputs.pixel_values, inputs.grid_thw, inputs.vision_at = pixels, grid, torch.arange(5, 11)
        got = ours.backbone.text_logits(ours(inputs).text_hidden)
    assert want.std() > 0.05
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# ---- Kimi-Audio ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audio_folder(tmp_path_factory) -> Path:
    return kimi_audio(tmp_path_factory.mktemp("kimi_audio"), torch.float32)


@pytest.fixture(scope="module")
def engine(audio_folder, tmp_path_factory):
    ours = tmp_path_factory.mktemp("ours")
    convert(audio_folder, ours, shard_bytes=200_000)
    return kimi_mm.load(ours)


def published_state(folder: Path, group: str = "") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {k: v for file in sorted((folder / group).glob("*.safetensors")) for k, v in load_file(file).items()}


def qwen2(state: dict[str, torch.Tensor], layers: list[str], norm: str, head: str):
    """A Qwen2 whose layers are the given ones of Kimi-Audio: one of its two branches on top of the trunk."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = transformers.Qwen2Config(
        **{key: KIMI_AUDIO[key] for key in (*keys, "head_dim", "rms_norm_eps", "rope_theta")},
        num_hidden_layers=len(layers),
        tie_word_embeddings=False,
    )
    renamed = {"model.norm.weight": state[norm], "lm_head.weight": state[head]}
    renamed["model.embed_tokens.weight"] = state["model.embed_tokens.weight"]
    for number, prefix in enumerate(layers):
        for key, value in state.items():
            if key.startswith(prefix) and "inv_freq" not in key:
                renamed[f"model.layers.{number}.{key.removeprefix(prefix)}"] = value
    model = transformers.Qwen2ForCausalLM(config).eval()
    model.load_state_dict(renamed)
    return model


def test_both_branches_of_kimi_audio(audio_folder, engine):
    """Both branches start from the un-normalised output of the trunk's last layer; audio is fused as sqrt(2)(E + w)."""
    state = published_state(audio_folder)
    trunk = [f"model.layers.{i}." for i in range(3)]
    text = qwen2(state, [*trunk, "model.layers.3.", "model.layers.4."], "model.norm.weight", "lm_head.weight")
    audio = qwen2(
        state, [*trunk, "model.mimo_layers.0.", "model.mimo_layers.1."], "model.mimo_norm.weight", "mimo_output.weight"
    )
    ids = torch.randint(0, 720, (2, 2, 25))
    features, mask = torch.randn(2, 25, 64), torch.zeros(2, 25, dtype=torch.bool)
    mask[0, 3:9] = mask[1, 10:20] = True
    w = [state[f"model.vq_adaptor.layers.{i}.{kind}"] for i in (0, 3, 4) for kind in ("weight", "bias")]
    linear = torch.nn.functional.linear
    adapted = linear(torch.nn.functional.silu(linear(features, w[0], w[1])), w[2], w[3])
    adapted = torch.nn.functional.layer_norm(adapted, (32,), w[4], w[5], eps=1e-6)
    table = state["model.embed_tokens.weight"]
    heard = torch.where(mask[..., None], (table[ids[1]] + adapted) * 2**0.5, table[ids[1]])
    embeds = heard + table[ids[0]]
    model = engine.model
    with torch.no_grad():
        output = model(ModelInputs(ids[0], ids[1], torch.tensor([25, 25]), features, mask))
        for head, hidden, theirs in (
            (model.backbone.text_logits, output.text_hidden, text),
            (model.backbone.audio_logits, output.audio_hidden, audio),
        ):
            want = theirs(inputs_embeds=embeds).logits
            assert want.shape[-1] == 720
            assert want.std() > 0.1
            torch.testing.assert_close(head(hidden), want, atol=1e-5, rtol=1e-5)
    assert len(model.backbone.new_cache(1).layers) == 3 + 2 + 2


def test_features_are_whisper_s(audio_folder, engine):
    """Continuous features: Whisper's own encoder on 30 s, four frames side by side, cut to the codes."""
    config = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_mel_bins=128,
    )
    encoder = transformers.WhisperModel(config).encoder.eval()
    state = published_state(audio_folder, "whisper-large-v3")
    wanted = {k.removeprefix("model.encoder."): v for k, v in state.items() if k.startswith("model.encoder.")}
    encoder.load_state_dict(wanted)
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    wave = torch.randn(23_456, generator=torch.Generator().manual_seed(3)).numpy() * 0.1
    mel = extractor(wave, sampling_rate=16_000, return_tensors="pt").input_features
    assert mel.shape == (1, 128, 3000)
    with torch.no_grad():
        hidden = encoder(mel).last_hidden_state
    tokens = engine.tokenizer.encode(wave)
    count = (len(wave) - 1) // 1280 + 1
    assert tokens.features.shape == (count, 64)
    torch.testing.assert_close(tokens.features, hidden[0, : 4 * count].reshape(count, 64), atol=1e-4, rtol=1e-4)


def glm_codes(folder: Path, mel: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """GLM-4-Voice's tokenizer by its formulas, on Whisper layers of transformers; mel [B, 128, T], mask [B, T]."""
    from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

    state = published_state(folder, "glm-4-voice-tokenizer")
    config = transformers.WhisperConfig(
        d_model=16, encoder_attention_heads=2, encoder_ffn_dim=32, attn_implementation="eager"
    )
    F = torch.nn.functional
    x = F.gelu(F.conv1d(F.pad(mel, (2, 0)), state["conv1.weight"], state["conv1.bias"]))
    x = F.gelu(F.conv1d(F.pad(x, (2, 0)), state["conv2.weight"], state["conv2.bias"], stride=2)).transpose(1, 2)
    frames = x.shape[1]
    x = x + state["embed_positions.weight"][:frames]
    valid = mask[:, ::2].bool()
    i = torch.arange(frames)
    allowed = ((i[None] <= i[:, None]) | (i[None] // 200 == i[:, None] // 200))[None] & valid[:, None]
    bias = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]
    for number in range(2):
        layer = WhisperEncoderLayer(config).eval()
        prefix = f"layers.{number}."
        layer.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        x = layer(x, bias)
        x = x[0] if isinstance(x, tuple) else x
    pooled = F.avg_pool1d(F.pad(x, (0, 0, 0, -frames % 4)).transpose(1, 2), 4).transpose(1, 2)
    distance = torch.cdist(pooled, state["codebook.weight"][None].expand(len(pooled), -1, -1))
    return torch.cat([row[keep] for row, keep in zip(distance.argmin(-1), valid[:, ::4], strict=True)])


@pytest.mark.parametrize("samples", [1280, 1281, 12_345, 16_000, 480_001, 496_000])
def test_codes_are_glm_s(audio_folder, engine, samples):
    """Segments of 30 s in one batch padded to the longest, block-causal attention of 4 s, averages of 4 frames."""
    wave = torch.randn(samples, generator=torch.Generator().manual_seed(samples)).numpy() * 0.1
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    segments = [wave[at : at + 480_000] for at in range(0, samples, 480_000)]
    features = extractor(
        segments,
        sampling_rate=16_000,
        return_attention_mask=True,
        return_tensors="pt",
        padding="longest",
        pad_to_multiple_of=1280,
        truncation=False,
    )
    with torch.no_grad():
        want = glm_codes(audio_folder, features.input_features, features.attention_mask)
    got = engine.tokenizer.encode(wave).codes
    assert len(got) == sum((len(segment) - 1) // 1280 + 1 for segment in segments)
    assert len(got) == len(want)
    assert len(got.unique()) >= min(3, len(got))
    # Log-mel agrees to 1e-6, so that a tie of two codes may fall otherwise; a wrong formula changes most of them.
    assert (got == want).float().mean() > 0.99


def test_every_code_makes_1920_samples(engine):
    codes = torch.randint(0, 320, (37,))
    assert engine.detokenizer.decode(codes).shape == (37 * 1920,)
