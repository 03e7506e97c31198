"""Kimi-Audio's published detokenizer as our tensors: names of both checkpoints, and the way in and out.

    audio_detokenizer/model.pt ["state_dict"]   "speech_model." + DiT names, 171 tensors   ─► DiT
    vocoder/model.pt ["generator"]              1206 tensors: weight norm, filters         ─► BigVGAN

The vocoder's convolutions are stored as direction `weight_v` and length `weight_g` (weight norm over the first axis);
we keep their product. Its filters are constants and are made anew.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kimi_mm.audio.bigvgan import BigVGAN, kaiser_sinc_filter
from kimi_mm.audio.dit import DiT
from kimi_mm.errors import CheckpointError

PREFIX = "speech_model."


def dit_names(dit: DiT) -> dict[str, str]:
    """Returns published name -> name in `DiT`, for every tensor of a DiT in the published shape.

    Raises:
        CheckpointError: when the DiT has parts that the published one lacks.
    """
    names = {
        "semantic_token_embedding.weight": "code_embedding.weight",
        **_pairs("t_embedder.mlp.0", "time_mlp.0"),
        **_pairs("t_embedder.mlp.2", "time_mlp.2"),
        **_pairs("input_linear", "input"),
        **_pairs("final_layer.linear", "output"),
        **_pairs("final_layer.adaLN_modulation.1", "output_modulation.expand"),
    }
    for i in range(dit.config.num_layers):
        theirs, ours = f"blocks.{i}.", f"blocks.{i}."
        names |= _pairs(theirs + "adaLN_modulation.1", ours + "modulation.expand")
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            names |= _pairs(theirs + part, ours + part.partition(".")[2])
    extra = sorted(set(dit.state_dict()) - set(names.values()))
    if extra:
        raise CheckpointError(f"a DiT with '{extra[0]}' has no published layout; see recipes/models.")
    return names


def dit_from_published(dit: DiT, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Picks the DiT out of `model.pt["state_dict"]`; the optimiser's copies and other entries are left behind.

    Args:
        dit: the model that will load the result (it may live on the meta device).
        state: tensors named with or without `PREFIX`.

    Returns:
        State dict for `DiT.load_state_dict`.

    Raises:
        CheckpointError: on a missing tensor, or one of another shape.
    """
    found = {name.partition(PREFIX)[2] or name: tensor for name, tensor in state.items()}
    return _taken({ours: found.get(theirs) for theirs, ours in dit_names(dit).items()}, dit, dit_names(dit))


def dit_to_published(dit: DiT) -> dict[str, torch.Tensor]:
    """Names the DiT's tensors as `model.pt["state_dict"]` does."""
    state = dit.state_dict()
    return {PREFIX + theirs: state[ours] for theirs, ours in dit_names(dit).items()}


def vocoder_names(vocoder: BigVGAN) -> dict[str, str | None]:
    """Returns published name -> name in `BigVGAN`; None for filters, which are constants.

    `X.weight_g` and `X.weight_v` both belong to our `Y.weight`.
    """
    names: dict[str, str | None] = {**_convolution("conv_pre", "pre"), **_convolution("conv_post", "post", bias=False)}
    names |= _activation("activation_post", "post_activation")
    for i in range(len(vocoder.ups)):
        names |= _convolution(f"ups.{i}.0", f"ups.{i}")
    count = len(vocoder.config.resblock_dilations)
    for i in range(len(vocoder.blocks)):
        for part in ("convs1", "convs2"):
            for j in range(count):
                names |= _convolution(f"resblocks.{i}.{part}.{j}", f"blocks.{i}.{part}.{j}")
        for j in range(2 * count):
            names |= _activation(f"resblocks.{i}.activations.{j}", f"blocks.{i}.activations.{j}")
    return names


def vocoder_from_published(vocoder: BigVGAN, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fuses the weight norm of `model.pt["generator"]`: weight = g * v / |v|, |v| over all axes but the first.

    Args:
        vocoder: the model that will load the result (it may live on the meta device).
        state: published tensors.

    Returns:
        State dict for `BigVGAN.load_state_dict`.

    Raises:
        CheckpointError: on a missing tensor, or one of another shape.
    """
    tensors: dict[str, torch.Tensor | None] = {}
    names = {theirs: ours for theirs, ours in vocoder_names(vocoder).items() if ours is not None}
    for theirs, ours in names.items():
        if not theirs.endswith("weight_v"):
            if not theirs.endswith("weight_g"):
                tensors[ours] = state.get(theirs)
            continue
        v, g = state.get(theirs), state.get(theirs.replace("weight_v", "weight_g"))
        tensors[ours] = None if v is None or g is None else g * v / v.norm(dim=(1, 2), keepdim=True)
    return _taken(tensors, vocoder, names)


def vocoder_to_published(vocoder: BigVGAN) -> dict[str, torch.Tensor]:
    """Names the vocoder's tensors as `model.pt["generator"]` does, with weight norm taken apart and filters added."""
    state, out = vocoder.state_dict(), {}
    for theirs, ours in vocoder_names(vocoder).items():
        if ours is None:
            out[theirs] = kaiser_sinc_filter()
        elif theirs.endswith("weight_g"):
            out[theirs] = state[ours].norm(dim=(1, 2), keepdim=True)
        else:
            out[theirs] = state[ours]
    return out


def _pairs(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}


def _convolution(theirs: str, ours: str, bias: bool = True) -> dict[str, str | None]:
    kinds = {"weight_g": "weight", "weight_v": "weight", **({"bias": "bias"} if bias else {})}
    return {f"{theirs}.{kind}": f"{ours}.{own}" for kind, own in kinds.items()}


def _activation(theirs: str, ours: str) -> dict[str, str | None]:
    filters = ("upsample.filter", "downsample.lowpass.filter")
    return {
        **{f"{theirs}.act.{kind}": f"{ours}.{kind}" for kind in ("alpha", "beta")},
        **{f"{theirs}.{kind}": None for kind in filters},
    }


def _taken(
    tensors: Mapping[str, torch.Tensor | None], module: torch.nn.Module, names: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """Checks that every tensor is there and fits."""
    theirs = {ours: name for name, ours in names.items()}
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name, tensor in tensors.items():
        if tensor is None:
            raise CheckpointError(f"the checkpoint lacks the tensor '{theirs[name]}'.")
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"the checkpoint's tensor '{theirs[name]}' has shape {list(tensor.shape)}, "
                f"the config needs {list(shapes[name])}."
            )
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
