"""Kimi-Audio's released loop, from its description: the layers of transformers' Qwen2, one step after another.

    prompt ─► 22 shared layers ─┬─► 6 layers ─► text logits ─► draw                                   each step
                                └─► 6 layers ─► audio logits ─► draw, blank for 6 steps
    30 codes ─► DiT, 29 Euler steps and one pass for the past ─► vocoder ─► the first 0.72 s

Its differences from the release: attention by PyTorch (the release demands flash-attn), and sound after every 30 codes
(the release makes it when the reply has ended, which is later).

Shapes: B rows, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kimi_mm.config import ModelConfig


class PublishedLM(nn.Module):
    """The language model with random weights: one table, a trunk, two branches, two heads.

    Args:
        config: of Kimi-Audio's shape.
        device, dtype: of the weights.
    """

    def __init__(self, config: ModelConfig, device: str, dtype: torch.dtype) -> None:
        from transformers import Qwen2Config
        from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

        super().__init__()
        backbone = config.backbone
        assert backbone.gqa is not None
        self.shared, self.text = len(backbone.trunk), len(backbone.text_branch)
        D, V = backbone.hidden_size, backbone.vocab_size
        settings = Qwen2Config(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=backbone.intermediate_size,
            num_hidden_layers=self.shared + self.text + len(backbone.audio_branch),
            num_attention_heads=backbone.gqa.num_heads,
            num_key_value_heads=backbone.gqa.num_kv_heads,
            head_dim=backbone.gqa.head_dim,
            rope_theta=backbone.gqa.rope.theta,
            rms_norm_eps=backbone.rms_norm_eps,
            attn_implementation="sdpa",
        )
        self.settings = settings
        with torch.device("meta"):
            self.embed = nn.Embedding(V, D)
            self.layers = nn.ModuleList(Qwen2DecoderLayer(settings, i) for i in range(settings.num_hidden_layers))
            self.norm, self.audio_norm = (Qwen2RMSNorm(D, backbone.rms_norm_eps) for _ in range(2))
            self.head, self.audio_head = nn.Linear(D, V, bias=False), nn.Linear(D, V, bias=False)
        self.to(dtype).to_empty(device=device)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)
        self.rotary = Qwen2RotaryEmbedding(settings).to(device)
        self.eval().requires_grad_(False)

    def forward(self, audio_ids: Tensor, text_ids: Tensor, cache: object, start: int) -> tuple[Tensor, Tensor]:
        """Ids [B, T] of both streams at positions from `start` on to the last position's logits [B, V], audio first."""
        x = self.embed(audio_ids) + self.embed(text_ids)
        positions = torch.arange(start, start + x.shape[1], device=x.device)[None]
        options = {
            "attention_mask": None,
            "position_ids": positions,
            "position_embeddings": self.rotary(x, positions),
            "past_key_values": cache,
            "use_cache": True,
        }
        branch = x
        for number, layer in enumerate(self.layers):
            if number == self.shared:
                branch = x.clone()
            if number < self.shared + self.text:
                x = layer(x, **options)
            else:
                branch = layer(branch, **options)
        return self.audio_head(self.audio_norm(branch))[:, -1], self.head(self.norm(x))[:, -1]


def draw(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    """The released sampler without its penalty: log-softmax in fp32, then the best, or one of the k best."""
    scores = logits.float().log_softmax(-1)
    if temperature <= 1e-6:
        return scores.argmax(-1)
    values, ids = (scores / temperature).exp().topk(top_k, -1)
    return ids.gather(-1, torch.multinomial(values, 1))[:, 0]


@torch.inference_mode()
def released_loop(model: PublishedLM, ids: Tensor, delay: int, blank: int, codes_from: int) -> Iterator[int | None]:
    """Yields, for each step without end, the code that it gave, None while speech waits for text.

    Args:
        model: decoded with.
        ids: [2, 1, T] of the prompt, text and audio.
        delay: steps that the audio stream is blank for.
        blank: id of a stream that is idle.
        codes_from: id of code 0; with random weights other ids are drawn, and taken for codes.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.settings)
    audio, text, start = ids[1], ids[0], 0
    for step in range(2**31):
        audio_logits, text_logits = model(audio, text, cache, start)
        start += text.shape[1]
        chosen = draw(text_logits, 0.0, 5)
        code = draw(audio_logits, 0.8, 10)
        said, heard = int(chosen), int(code)  # the loop looks at both to see whether to stop
        audio = torch.full_like(code, blank)[:, None] if step < delay else code[:, None]
        text = chosen[:, None]
        yield None if step < delay or said < 0 else max(0, heard - codes_from)
