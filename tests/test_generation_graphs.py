"""Decoding in fixed room: the steps of a growing cache, nothing read back, and on a GPU the graph's steps too."""

from __future__ import annotations

import pytest
import torch

from kimi_mm.config import (
    BackboneConfig,
    GQAConfig,
    KDAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    VocabConfig,
)
from kimi_mm.generation_graphs import Slot, Steps, can_be_captured
from kimi_mm.generation_speech import SpeechSampling, TwoStreams
from kimi_mm.model import Model
from kimi_mm.processing import ModelInputs
from kimi_mm.quantized import QuantizedExperts
from kimi_mm.training.recipe import recipes_root

VOCAB = VocabConfig(num_text_tokens=100, num_audio_codes=64)
DEBUG = ModelConfig.from_yaml(recipes_root() / "models" / "debug.yaml")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def model(device: str = "cpu") -> Model:
    torch.manual_seed(0)
    backbone = BackboneConfig(
        vocab_size=VOCAB.size,
        hidden_size=64,
        trunk=("kda/dense", "gqa/moe"),
        text_branch=("mla/moe",),
        audio_branch=("gqa/dense",),
        audio_head=True,
        intermediate_size=64,
        kda=KDAConfig(num_heads=2, head_dim=16),
        mla=MLAConfig(num_heads=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, rope=RopeConfig()),
        gqa=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=16),
        moe=MoEConfig(num_experts=4, num_experts_per_token=2, intermediate_size=32),
    )
    net = Model(ModelConfig(backbone=backbone, vocab=VOCAB, audio=DEBUG.audio, audio_delay=2)).eval()
    with torch.no_grad():
        for parameter in net.backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net.to(device)


def prefilled(net: Model, lengths: tuple[int, ...], device: str = "cpu"):
    """A cache and the inputs that filled it; rows of one length are no ragged batch."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 100, (2, len(lengths), max(lengths)), generator=generator).to(device)
    cache = net.backbone.new_cache(len(lengths))
    with torch.inference_mode():
        ragged = torch.tensor(lengths, device=device) if len(set(lengths)) > 1 else None
        net.backbone(net.backbone.embed(ids[0], ids[1]), lengths=ragged, cache=cache)
    return cache


def decoded(step, count: int, batch: int, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 100, (2, batch), generator=generator).to(device)
        output = step(ids[0], ids[1])
        found.append(torch.cat([output.text_hidden, output.audio_hidden], -1).clone())
    return torch.cat(found, 1)


@pytest.mark.parametrize("lengths", [(9,), (9, 4, 1)], ids=["one row", "ragged rows"])
def test_fixed_room_gives_what_growing_room_gives(lengths):
    net = model()
    cache = prefilled(net, lengths)
    slot = Slot(net, cache, 40, capture=False)
    tensors = [tensor.data_ptr() for layer in slot.cache.layers for tensor in layer.tensors().values()]
    with torch.inference_mode():
        want = decoded(lambda a, b: net.step(a, b, cache), 12, len(lengths))
        got = decoded(slot, 12, len(lengths))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert tensors == [tensor.data_ptr() for layer in slot.cache.layers for tensor in layer.tensors().values()]
    assert slot.cache.lengths.tolist() == [length + 12 for length in lengths]
    again = slot.cache.clone()  # grows as ever
    with torch.inference_mode():
        both = [decoded(lambda a, b, c=c: net.step(a, b, c), 40, len(lengths)) for c in (again, cache)]
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5)


def test_a_slot_is_filled_again():
    net = model()
    first, second = prefilled(net, (20,)), prefilled(net, (6,))
    slot = Slot(net, first, 40, capture=False)
    decoded(slot, 5, 1)
    slot.cache.fill(second)
    with torch.inference_mode():
        want = decoded(lambda a, b: net.step(a, b, second), 8, 1)
    torch.testing.assert_close(decoded(slot, 8, 1), want, atol=1e-5, rtol=1e-5)


def test_room_ends_loudly():
    net = model()
    slot = Slot(net, prefilled(net, (5,)), 7, capture=False)
    decoded(slot, 2, 1)
    assert slot.full
    with pytest.raises(ValueError, match="7 in all"):
        decoded(slot, 1, 1)
    with pytest.raises(ValueError, match="more than 5"):
        prefilled(net, (5,)).reserve(5)


def test_no_step_depends_on_values():
    """On the meta device a tensor has no values: any readback raises, as it would break a capture."""
    net = model().to("meta")
    cache = net.backbone.new_cache(2, device="meta")
    net.backbone(net.backbone.embed(*torch.zeros(2, 2, 5, dtype=torch.int64, device="meta")), cache=cache)
    fixed = cache.reserve(16)
    ids = torch.zeros(2, dtype=torch.int64, device="meta")
    for _ in range(3):
        output = net.step(ids, ids, fixed)
    assert output.text_hidden.shape == (2, 1, 64)


def test_which_models_are_captured():
    net = model()
    assert can_be_captured(net)
    packed = torch.zeros(4, 64, 8, dtype=torch.int32), torch.zeros(4, 64, 2)
    net.backbone.trunk[1].mlp.experts = QuantizedExperts(packed, packed)
    assert not can_be_captured(net)
    steps = Steps(model(), prefilled(model(), (3,)), room=4)
    assert steps._slot is None  # a CPU has no graphs


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("lengths", [(9,), (9, 4, 1)], ids=["one row", "ragged rows"])
def test_replayed_steps_are_eager_steps(lengths):
    net = model("cuda")
    want = decoded(Steps(net, prefilled(net, lengths, "cuda"), room=12, graphs=False), 12, len(lengths), "cuda")
    for _ in range(2):  # captured, then taken again from where it was kept
        steps = Steps(net, prefilled(net, lengths, "cuda"), room=12, graphs=True)
        torch.testing.assert_close(decoded(steps, 12, len(lengths), "cuda"), want, atol=2e-3, rtol=2e-3)
        steps.close()


@pytest.mark.gpu
@CUDA
def test_spoken_replies_are_those_without_graphs():
    net = model("cuda")
    ids = torch.randint(0, 100, (2, 1, 9), device="cuda")
    sampling = SpeechSampling(max_audio_codes=30, max_text_tokens=10, min_audio_codes=30)
    found = []
    for graphs in (False, True):
        inputs = ModelInputs(ids[0], ids[1], torch.tensor([9], device="cuda"))
        generator = torch.Generator().manual_seed(0)
        found += TwoStreams(net, inputs, sampling=sampling, generator=generator, graphs=graphs).run()
    assert found[0].codes == found[1].codes
    assert found[0].text_ids == found[1].text_ids
