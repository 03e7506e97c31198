"""The training path on a GPU: no waiting for the host, and the same numbers from a CUDA graph."""

import pytest
import torch

from kimi_mm.audio.tokenizer import AudioTokenizer
from kimi_mm.config import AudioEncoderConfig, AudioTokenizerConfig, MelConfig, QuantizerConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = AudioTokenizerConfig(
    mel=MelConfig(num_mel_bins=80),
    encoder=AudioEncoderConfig(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128),
    quantizer=QuantizerConfig(codebook_size=32, codebook_dim=16, hidden_layers=1, hidden_size=64, num_heads=2),
)
SAMPLES = 60 * 1280


def make(revive_below: float) -> AudioTokenizer:
    torch.manual_seed(0)
    quantizer = CONFIG.quantizer.replace(revive_below=revive_below)
    return AudioTokenizer(CONFIG.replace(quantizer=quantizer)).cuda().train()


def step(tokenizer: AudioTokenizer, wave: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(SAMPLES // 1280, device=wave.device) * 1280 < lengths[:, None]
    out = tokenizer.quantize(tokenizer.features_from_wave(wave, lengths), mask)
    return out.codes, out.loss


@pytest.mark.parametrize("revive_below", [0.0, 0.995])
def test_graph_equals_eager(revive_below: float) -> None:
    """Revival draws from a graph's own random numbers, so its codebook is only checked for being alive."""
    eager, graphed = make(revive_below), make(revive_below)
    waves = torch.randn(4, 2, SAMPLES, device="cuda") * torch.tensor([0.1, 0.3], device="cuda")[:, None]
    lengths = torch.tensor([SAMPLES, 20_000], device="cuda")
    static = waves[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(graphed, static, lengths)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graphed.load_state_dict(eager.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, loss = step(graphed, static, lengths)
    graphed.load_state_dict(eager.state_dict())
    for wave in waves:
        static.copy_(wave)
        graph.replay()
        expected_codes, expected_loss = step(eager, wave, lengths)
        if revive_below == 0.0:
            assert torch.equal(codes, expected_codes)
            torch.testing.assert_close(loss, expected_loss)
            torch.testing.assert_close(graphed.quantizer.codebook, eager.quantizer.codebook)
    counts = graphed.quantizer.ema_count
    assert counts.isfinite().all()
    assert (counts >= revive_below).all()


def test_encode_agrees_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    tokenizer = make(0.0).eval()
    wave = 0.2 * torch.randn(40 * 16_000 + 77)
    on_gpu = tokenizer.encode(wave)
    on_cpu = tokenizer.cpu().encode(wave)
    assert on_gpu.codes.is_cuda
    torch.testing.assert_close(on_gpu.features.cpu(), on_cpu.features, atol=2e-3, rtol=0)
    assert (on_gpu.codes.cpu() == on_cpu.codes).float().mean() > 0.98
