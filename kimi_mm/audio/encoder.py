"""Whisper-style audio encoder, with full or block-causal attention, over a whole batch or block by block.

    mel [B, T, M] ─► conv k3 ─► GELU ─► conv k3, stride 2 ─► GELU ─► + positions ─► layers ─► norm ─► [B, T / 2, D]

With `causal_convolution` both convolutions look back only, and with `block_size` a frame attends to its own block and
everything before it; such an encoder runs as a stream, one block at a time, with the past in an `EncoderState`.
Positions restart every `max_positions` frames (30 s), where a stream forgets its state: segments are independent.

Shapes: B rows, T mel frames (100 Hz), L = T / 2 encoder frames (50 Hz), P past frames, M mel bins, D hidden size,
H heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from kimi_mm.config import AudioEncoderConfig

_LOG = torch.log(torch.tensor(1e4, device="cpu")).item()  # in fp32, as Whisper has it
KeyValue = tuple[torch.Tensor, torch.Tensor]  # two [B, H, P, K]


@dataclass
class EncoderState:
    """What a stream keeps between blocks: mel and conv context, and keys and values of every layer."""

    mel: torch.Tensor | None = None  # [B, 2, M]
    conv: torch.Tensor | None = None  # [B, D, 2]
    past: list[KeyValue | None] = field(default_factory=list)
    position: int = 0  # frames since the segment began

    def clone(self) -> EncoderState:
        """Returns a copy; tensors are never written in place, so they can be shared."""
        return EncoderState(self.mel, self.conv, list(self.past), self.position)


class SelfAttention(nn.Module):
    """Multi-head attention with Whisper's biases: none on the keys."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, past: KeyValue | None
    ) -> tuple[torch.Tensor, KeyValue]:
        """Attends from x [B, L, D] to `past` and itself; mask [.., L, P + L] is True where a key may be seen."""
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), (k, v)


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer with an exact GELU."""

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(hidden_size)
        self.self_attn = SelfAttention(hidden_size, num_heads)
        self.final_layer_norm = nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, past: KeyValue | None = None
    ) -> tuple[torch.Tensor, KeyValue]:
        heard, present = self.self_attn(self.self_attn_layer_norm(x), mask, past)
        x = x + heard
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))), present


class AudioEncoder(nn.Module):
    """The encoder of the tokenizer.

    Args:
        config: sizes; `block_size=None` and `causal_convolution=False` are Whisper itself.
        num_mel_bins: width M of the input.
    """

    positions: torch.Tensor

    def __init__(self, config: AudioEncoderConfig, num_mel_bins: int) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.conv1 = nn.Conv1d(num_mel_bins, size, 3)
        self.conv2 = nn.Conv1d(size, size, 3, stride=2)
        if config.learned_positions:
            self.positions = nn.Parameter(sinusoids(config.max_positions, size))
        else:
            with torch.device("cpu"):  # constants are real even in a model laid out on the meta device
                self.register_buffer("positions", sinusoids(config.max_positions, size), persistent=False)
        self.layers = nn.ModuleList(
            EncoderLayer(size, config.num_heads, config.intermediate_size) for _ in range(config.num_layers)
        )
        self.layer_norm = nn.LayerNorm(size) if config.final_norm else nn.Identity()

    @property
    def streams(self) -> bool:
        """Whether the encoder can run block by block."""
        return self.config.causal_convolution and self.config.block_size is not None

    def forward(self, mel: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Encodes whole recordings.

        Args:
            mel: [B, T, M], T even.
            lengths: [B] valid 50 Hz frames of right-padded rows; padding is hidden from attention. None: all valid.

        Returns:
            [B, T / 2, D]; recordings longer than `max_positions` frames are encoded in independent segments.
        """
        limit = 2 * self.config.max_positions
        outputs = []
        for number, piece in enumerate(mel.split(limit, dim=1)):
            valid = None if lengths is None else lengths - number * self.config.max_positions
            outputs.append(self._segment(piece, valid))
        return torch.cat(outputs, 1)

    def _segment(self, mel: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        pad = (2, 0) if self.config.causal_convolution else (1, 1)
        x = F.gelu(self.conv1(F.pad(mel.transpose(1, 2), pad)))
        x = F.gelu(self.conv2(F.pad(x, pad))).transpose(1, 2)
        length = x.shape[1]
        x = x + self.positions[:length]
        valid = None if lengths is None else torch.arange(length, device=x.device) < lengths[:, None]
        mask = attention_mask(length, self.config.block_size, valid, x.device)
        for layer in self.layers:
            x, _ = layer(x, mask)
        return self.layer_norm(x)

    def step(self, mel: torch.Tensor, state: EncoderState) -> tuple[torch.Tensor, EncoderState]:
        """Encodes the next block of a stream.

        Args:
            mel: [B, T, M]: exactly one block, or less at the end of the recording; T even.
            state: what the blocks before left; a fresh `EncoderState()` at the start.

        Returns:
            [B, T / 2, D] and the next state; equal to the same frames of `forward`.
        """
        assert self.streams
        assert mel.shape[1] % 2 == 0
        if state.position >= self.config.max_positions:
            state = EncoderState()
        before = mel.new_zeros(len(mel), 2, mel.shape[2]) if state.mel is None else state.mel
        mel = torch.cat([before, mel], 1)
        x = F.gelu(self.conv1(mel.transpose(1, 2)))
        context = x.new_zeros(len(x), x.shape[1], 2) if state.conv is None else state.conv
        joined = torch.cat([context, x], 2)
        x = F.gelu(self.conv2(joined)).transpose(1, 2)
        x = x + self.positions[state.position : state.position + x.shape[1]]
        past = state.past or [None] * len(self.layers)
        present: list[KeyValue | None] = []
        for layer, memory in zip(self.layers, past, strict=True):
            x, keys = layer(x, None, memory)
            present.append(keys)
        return self.layer_norm(x), EncoderState(mel[:, -2:], joined[:, :, -2:], present, state.position + x.shape[1])


def attention_mask(
    length: int, block: int | None, valid: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """Returns a bool mask broadcastable to [B, H, length, length], True where frame i may see frame j.

    Args:
        length: frames.
        block: j's block must be i's or an earlier one; None: no restriction.
        valid: [B, length], True where there is something to see; None: everywhere.
        device: of the mask.
    """
    mask = None
    if block is not None and length > block:
        number = torch.arange(length, device=device) // block
        mask = number[:, None] >= number[None]
    if valid is not None:
        # The first frame can always be seen: a softmax over nothing is NaN.
        keys = (valid | (torch.arange(length, device=device) == 0))[:, None, None]
        mask = keys if mask is None else mask & keys
    return mask


def sinusoids(length: int, channels: int) -> torch.Tensor:
    """Returns Whisper's positions [length, channels]: sines, then cosines, of wavelengths 2 pi to 20000 pi."""
    half = channels // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float64) * -(_LOG / (half - 1)))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1).float()
