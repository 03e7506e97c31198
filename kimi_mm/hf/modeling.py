"""`Model` behind transformers' interface: `from_pretrained`, `forward` with logits and loss, `generate`.

    input_ids [B, T], audio_ids [B, T] ─┐
    waves [C, S], clip_at [C] ─► codes, features at their places ─► Model ─► text logits [B, T, V]
    pixel_values, grid_thw, vision_at ──┘

Shapes: B rows, T positions, C recordings, S samples at 16 kHz, V vocabulary. Everything comes from `KimiMMProcessor`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from kimi_mm.conversion.convert import native_targets
from kimi_mm.conversion.hub import locate
from kimi_mm.conversion.loading import fill
from kimi_mm.errors import UserError
from kimi_mm.generation import TextSampling, generate_text
from kimi_mm.hf.configuration import KimiMMConfig
from kimi_mm.model import Model
from kimi_mm.processing import ModelInputs


class KimiMMForConditionalGeneration(PreTrainedModel):
    """A model of this package; `model.model` is the `kimi_mm.model.Model` itself."""

    config_class = KimiMMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: KimiMMConfig) -> None:
        super().__init__(config)
        self.model = Model(config.model_config)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        config: KimiMMConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | None = None,
        **options: Any,
    ) -> KimiMMForConditionalGeneration:
        """Loads a folder or a repository.

        Args:
            pretrained_model_name_or_path: with `config.json` and safetensors files.
            config: taken instead of the folder's.
            dtype: of the weights; None or "auto" keeps fp32.
            device_map: one device for all of it ("cuda"); "auto" is the GPU when there is one.

        Raises:
            CheckpointError: names the file, and the tensor where there is one.
        """
        folder = locate(pretrained_model_name_or_path)
        config = config or KimiMMConfig.from_pretrained(folder)
        kind = dtype or options.get("torch_dtype")
        kind = getattr(torch, kind) if isinstance(kind, str) and kind != "auto" else kind
        device = device_map or "cpu"
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device("meta"):
            model = cls(config)
        number = kind if isinstance(kind, torch.dtype) else torch.float32
        model.model = fill(config.model_config, native_targets(folder), folder, dtype=number, device=device)
        model.config.name_or_path = str(pretrained_model_name_or_path)
        return model.eval()

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # type: ignore[override]
        """Writes `config.json` and the weights as safetensors; the processor saves its own files."""
        from kimi_mm.checkpoint import save_tensors

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        state = {k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items() if ".ema_" not in k}
        save_tensors(folder, state, options.get("shard_bytes", 2**31))

    def forward(
        self,
        input_ids: torch.Tensor,
        audio_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **media: Any,
    ) -> CausalLMOutput:
        """Computes logits of the text stream.

        Args:
            input_ids: [B, T] of the text stream.
            audio_ids: [B, T] of the audio stream; None: blank.
            attention_mask: [B, T], 0 at padding on the right; None: all valid.
            labels: [B, T], -100 where there is none; position t predicts label t + 1, as usual.
            media: recordings and pictures, as the processor gives them.

        Returns:
            logits [B, T, V], and the loss with `labels`.

        Raises:
            UserError: padding on the left.
        """
        inputs = self._inputs(input_ids, audio_ids, attention_mask, media)
        logits = self.model.backbone.text_logits(self.model(inputs).text_hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)  # type: ignore[arg-type]

    @torch.inference_mode()
    def generate(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        audio_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        generator: torch.Generator | None = None,
        **media: Any,
    ) -> torch.Tensor:
        """Answers in text.

        Args:
            input_ids, audio_ids, attention_mask, media: as for `forward`.
            max_new_tokens: longest answer.
            do_sample, temperature, top_k: False is greedy.
            generator: source of randomness.

        Returns:
            New ids alone, [B, N] int64, padded with the pad id.
        """
        inputs = self._inputs(input_ids, audio_ids, attention_mask, media)
        sampling = TextSampling(temperature if do_sample else 0.0, top_k, max_new_tokens)
        results = generate_text(self.model, inputs, sampling=sampling, generator=generator)
        longest = max(1, max(len(result.ids) for result in results))
        out = torch.full((len(results), longest), self.config.pad_token_id, device=input_ids.device)
        for row, result in enumerate(results):
            out[row, : len(result.ids)] = torch.tensor(result.ids, dtype=torch.int64, device=input_ids.device)
        return out

    def _inputs(
        self,
        text_ids: torch.Tensor,
        audio_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        media: dict[str, Any],
    ) -> ModelInputs:
        config = self.model.config
        blank = config.vocab.special("text_blank")
        audio_ids = torch.full_like(text_ids, blank) if audio_ids is None else audio_ids.clone()
        mask = torch.ones_like(text_ids) if attention_mask is None else attention_mask
        if bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise UserError(
                "attention_mask has zeros before ones; pad on the right (tokenizer.padding_side = 'right')."
            )
        inputs = ModelInputs(text_ids, audio_ids, mask.sum(1))
        names = ("pixel_values", "grid_thw", "vision_at")
        for name in names:
            setattr(inputs, name, media.get(name))
        if media.get("waves") is None:
            return inputs
        width = config.audio.feature_size
        features = torch.zeros(text_ids.numel(), width, device=text_ids.device)
        heard = torch.zeros(text_ids.numel(), dtype=torch.bool, device=text_ids.device)
        flat = audio_ids.view(-1)
        for wave, length, start in zip(
            media["waves"], media["wave_lengths"].tolist(), media["clip_at"].tolist(), strict=True
        ):
            tokens = self.model.audio.encode(wave[:length].float().cpu().numpy())
            span = slice(start, start + len(tokens.codes))
            flat[span] = config.vocab.audio_offset + tokens.codes.to(flat.device)
            features[span], heard[span] = tokens.features.to(features), True
        inputs.features, inputs.feature_mask = features.view(*text_ids.shape, width), heard.view(text_ids.shape)
        return inputs
