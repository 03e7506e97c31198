"""Codes to speech: exact lengths, the same samples for any pieces, batches, prompts, seams, bad input."""

import numpy as np
import pytest
import torch

from kimi_mm.audio.detokenizer import Detokenizer
from kimi_mm.audio.detokenizer_config import BigVGANConfig, DetokenizerConfig, kimi_audio_detokenizer
from kimi_mm.audio.detokenizer_stream import advance
from kimi_mm.audio.seams import seam_energy, seam_positions
from kimi_mm.config import ModelConfig
from kimi_mm.errors import AudioError, UserError
from kimi_mm.training.recipe import recipes_root

CODES = torch.randint(0, 64, (37,), generator=torch.Generator().manual_seed(3))


def make(config: DetokenizerConfig, std: float = 0.1) -> Detokenizer:
    torch.manual_seed(0)
    detokenizer = Detokenizer(config).eval()
    for parameter in detokenizer.dit.parameters():  # the zeros it starts with would hide everything
        torch.nn.init.normal_(parameter, std=std)
    return detokenizer


@pytest.fixture(scope="module")
def debug() -> DetokenizerConfig:
    return DetokenizerConfig.from_yaml(recipes_root() / "models" / "detokenizer" / "debug.yaml")


@pytest.fixture(scope="module")
def nano(debug) -> Detokenizer:
    """Without a source, whose random pitch jumps where sums are rounded in another order."""
    return make(debug.replace(vocoder=debug.vocoder.replace(source=False)))


@pytest.fixture(scope="module")
def sourced(debug) -> Detokenizer:
    return make(debug)


@pytest.fixture(scope="module")
def published(debug) -> Detokenizer:
    """The published architecture, with its fades, at debug size."""
    gan = BigVGANConfig(initial_channels=128, resblock_kernels=(3,), resblock_dilations=(1,))
    dit = debug.dit.replace(modulation_rank=None, frame_phase=False, condition_input=False, integer_time=True)
    return make(debug.replace(vocoder=None, bigvgan=gan, dit=dit))


def in_pieces(detokenizer: Detokenizer, codes: torch.Tensor, pieces: list[int], **options) -> torch.Tensor:
    stream = detokenizer.stream(**options)
    out = [stream.push(piece) for piece in codes.split(pieces)]
    return torch.cat([*out, stream.flush()])


@pytest.mark.parametrize("kind", ["nano", "sourced", "published"])
@pytest.mark.parametrize("pieces", [[1] * 37, [10, 0, 20, 7], [36, 1], [3, 34], [5, 4, 4, 24]])
def test_same_samples_however_codes_arrive(kind, pieces, request):
    detokenizer = request.getfixturevalue(kind)
    whole = detokenizer.decode(CODES)
    assert whole.shape == (37 * 1920,)
    assert whole.isfinite().all()
    assert whole.abs().max() <= 1
    assert torch.equal(in_pieces(detokenizer, CODES, pieces), whole)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 9, 10, 13])
@pytest.mark.parametrize("kind", ["nano", "published"])
def test_every_code_gives_1920_samples(kind, count, request):
    assert len(request.getfixturevalue(kind).decode(CODES[:count])) == 1920 * count


@pytest.mark.parametrize(("first", "chunk", "look_ahead"), [(1, 1, 0), (3, 7, 2), (37, 5, 30), (100, 4, 9)])
def test_chunk_sizes_are_free(nano, first, chunk, look_ahead):
    streaming = nano.config.streaming.replace(
        first_chunk_codes=first, chunk_codes=chunk, look_ahead_codes=look_ahead, solver="midpoint", steps=2
    )
    whole = nano.decode(CODES, streaming=streaming)
    assert len(whole) == 37 * 1920
    assert torch.equal(in_pieces(nano, CODES, [6, 31], streaming=streaming), whole)


def test_first_sound_comes_after_the_first_chunk(nano):
    stream = nano.stream()
    heard = [len(stream.push([int(code)])) for code in CODES[:9]]
    kept = nano.config.streaming.first_chunk_codes - nano.config.streaming.look_ahead_codes
    assert heard == [0, 0, 0, 0, kept * 1920 - nano.vocoder.delay, 0, 0, 0, 4 * 1920]


def test_first_chunk_alone_is_the_offline_solution(nano):
    """One chunk for everything: mel by one solve from the stream's noise, then the vocoder over the whole."""
    streaming = nano.config.streaming.replace(first_chunk_codes=64)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        noise = torch.cat([torch.randn(4, 20, generator=generator) for _ in CODES])[None]
        mel = nano.solve(noise, CODES[None], nano.dit.empty_cache(), [noise.shape[1]], streaming)
        offline = nano.vocoder(nano.mel.denormalize(mel))[0]
    assert torch.allclose(nano.decode(CODES, streaming=streaming), offline, atol=1e-5)


def test_noise_comes_from_the_generator_alone(nano):
    a, b = (nano.decode(CODES, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    torch.manual_seed(99)
    again = nano.decode(CODES, generator=torch.Generator().manual_seed(1))
    assert torch.equal(a, again)
    assert not torch.allclose(a, b, atol=1e-4)


def test_streams_side_by_side_equal_streams_alone(nano):
    lengths = [37, 3, 20, 5]
    alone = [nano.decode(CODES[:n]) for n in lengths]
    for wave, other in zip(nano.decode_batch([CODES[:n] for n in lengths]), alone, strict=True):
        assert torch.allclose(wave, other, atol=1e-5)
    streams = [nano.stream() for _ in range(2)]
    late, early = CODES, CODES[:20]
    waves = [
        advance(streams, [late[:2], early[:9]]),
        advance(streams, [late[2:30], early[9:10]]),
        advance(streams[:1], [late[30:]]),
    ]
    ends = advance(streams, [[], early[10:]], final=True)
    assert torch.allclose(torch.cat([waves[0][0], waves[1][0], waves[2][0], ends[0]]), alone[0], atol=1e-5)
    assert torch.allclose(torch.cat([waves[0][1], waves[1][1], ends[1]]), alone[2], atol=1e-5)


@pytest.mark.parametrize("kind", ["nano", "published"])
def test_the_padding_that_graphs_need_changes_nothing(kind, request):
    detokenizer = request.getfixturevalue(kind)
    plain = detokenizer.decode_batch([CODES, CODES[:20], CODES[:3]])
    try:
        padded = detokenizer.use_cuda_graphs().decode_batch([CODES, CODES[:20], CODES[:3]])
    finally:
        detokenizer.use_cuda_graphs(False)
    for a, b in zip(plain, padded, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nano", "published"])
def test_graphs_equal_launches(kind, request):
    plain = request.getfixturevalue(kind)
    detokenizer = make(plain.config).cuda()
    codes = [CODES, CODES[:20], CODES[:3]]
    eager = detokenizer.decode_batch(codes)
    detokenizer.use_cuda_graphs()
    for _ in range(2):  # captured, then replayed
        for a, b in zip(eager, detokenizer.decode_batch(codes), strict=True):
            assert torch.allclose(a, b, atol=2e-3)
    for a, b in zip(eager, plain.decode_batch(codes), strict=True):
        assert torch.allclose(a.cpu(), b, atol=2e-2)


def test_a_copied_stream_goes_on_by_itself(nano):
    stream = nano.stream()
    begin = stream.push(CODES[:11])
    twin = stream.clone()
    other = [twin.push(CODES[20:]), twin.flush()]
    rest = [stream.push(CODES[11:]), stream.flush()]
    assert torch.equal(torch.cat([begin, *rest]), nano.decode(CODES))
    assert torch.equal(torch.cat([begin, *other]), nano.decode(torch.cat([CODES[:11], CODES[20:]])))


def test_guidance_moves_the_result_and_costs_one_batch(nano):
    streaming = nano.config.streaming
    plain = nano.decode(CODES, streaming=streaming)
    assert not torch.allclose(nano.decode(CODES, streaming=streaming.replace(guidance=2.0)), plain, atol=1e-3)
    waves = nano.decode_batch([CODES, CODES[:9]], streaming=streaming.replace(guidance=2.0))
    assert torch.allclose(waves[1], nano.decode(CODES[:9], streaming=streaming.replace(guidance=2.0)), atol=1e-5)


def test_seams_cannot_be_heard(nano):
    """Random weights draw mel that jumps from frame to frame, so a seam may not stand out from any frame's edge."""
    codes = CODES.repeat(4)
    seams = seam_positions(nano.config, len(codes))
    assert seams[:3] == [3 * 1920, 7 * 1920, 11 * 1920]
    assert len(seams) == 1 + (len(codes) - 5) // 4
    assert seam_energy(nano.decode(codes), seams) < 1.5
    smooth = torch.sin(torch.arange(len(codes) * 1920) / 20)
    assert 0.8 < seam_energy(smooth, seams) < 1.2
    for seam in seams:
        smooth[seam:] += 0.1
    assert seam_energy(smooth, seams) > 10


# ---- speaker prompts ------------------------------------------------------------------------------------------------


def hum(seconds: float, rate: int, hertz: float = 150.0) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return sum(0.1 / k * np.sin(2 * np.pi * hertz * k * time) for k in range(1, 9)).astype(np.float32)


def test_prompt_changes_the_voice_for_the_whole_stream(nano):
    prompt = nano.prompt(hum(0.6, 24_000), 24_000)
    long = CODES.repeat(3)
    plain, prompted = nano.decode(long), nano.decode(long, prompt=prompt)
    assert len(prompted) == len(plain)
    assert (plain - prompted).abs()[-1920:].max() > 1e-4
    stream = nano.stream(prompt=prompt)
    stream.push(long)
    assert stream.state.cache.prompts == prompt.cache.prompts == (28,)
    assert stream.state.cache.lengths[0] <= nano.config.dit.context_frames


def test_prompts_of_any_rate_and_length(nano):
    at_24, at_16 = (nano.prompt(hum(1.0, rate), rate) for rate in (24_000, 16_000))
    assert at_24.cache.lengths == at_16.cache.lengths
    assert torch.nn.functional.cosine_similarity(at_24.cache.keys.flatten(), at_16.cache.keys.flatten(), 0) > 0.98
    long = nano.prompt(hum(9.0, 8000), 8000)
    assert long.cache.lengths[0] <= nano.config.dit.context_frames // 2
    stereo = nano.prompt(np.stack([hum(1.0, 24_000)] * 2), 24_000, codes=CODES[:13])
    assert not torch.allclose(stereo.cache.keys, at_24.cache.keys, atol=1e-3)


def test_bad_prompts_are_refused(nano):
    with pytest.raises(AudioError, match=r"0\.20 s"):
        nano.prompt(hum(0.2, 24_000), 24_000)
    with pytest.raises(AudioError, match="sample rate 12 Hz"):
        nano.prompt(hum(1.0, 24_000), 12)
    with pytest.raises(AudioError, match="NaN"):
        nano.prompt(np.full(24_000, np.nan, np.float32), 24_000)
    with pytest.raises(AudioError, match="lasts 13 codes, but 37"):
        nano.prompt(hum(1.0, 24_000), 24_000, codes=CODES)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([], "no codes"),
        ([3, 64], "code 64 is not in the codebook, which has 64"),
        ([3, -1], "code -1"),
        ([0.5, 1.0], "whole numbers"),
        ([[1, 2], [3, 4]], "whole numbers"),
        (["a"], "whole numbers"),
    ],
)
def test_bad_codes_are_refused(nano, codes, message):
    with pytest.raises(AudioError, match=message):
        nano.decode(codes)


def test_a_refused_piece_leaves_the_stream_as_it_was(nano):
    stream = nano.stream()
    begin = stream.push(CODES[:7])
    with pytest.raises(AudioError):
        stream.push([1, 2, 9999])
    assert torch.equal(torch.cat([begin, stream.push(CODES[7:]), stream.flush()]), nano.decode(CODES))


@pytest.mark.parametrize("kind", ["nano", "published"])
def test_streams_end_once(kind, request):
    detokenizer = request.getfixturevalue(kind)
    stream = detokenizer.stream()
    assert len(stream.push([])) == len(stream.flush()) == 0
    for call in (stream.flush, lambda: stream.push(CODES)):
        with pytest.raises(AudioError, match="flushed already"):
            call()


def test_wild_weights_give_finite_sound(debug):
    wave = make(debug, std=3.0).decode(CODES)
    assert wave.isfinite().all()
    assert wave.abs().max() <= 1


@pytest.mark.parametrize("name", ["nano", "debug", "kimi-audio"])
def test_preset_files_round_trip(name, tmp_path):
    config = DetokenizerConfig.from_yaml(recipes_root() / "models" / "detokenizer" / f"{name}.yaml")
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert DetokenizerConfig.from_yaml(tmp_path / "again.yaml") == config
    assert (name == "kimi-audio") == (config == kimi_audio_detokenizer())
    assert config.samples_per_code == 1920


def test_model_and_detokenizer_must_fit(debug):
    values = ModelConfig.from_yaml(recipes_root() / "models" / "debug.yaml")
    assert values.replace(detokenizer=debug).detokenizer == debug
    with pytest.raises(UserError, match="codebook_size=65"):
        values.replace(detokenizer=debug.replace(dit=debug.dit.replace(codebook_size=65)))
    with pytest.raises(UserError, match="stands for 80 ms"):
        values.replace(detokenizer=debug.replace(frames_per_code=5))
    again = ModelConfig.from_dict(values.replace(detokenizer=debug).to_dict())
    assert again.detokenizer == debug
