"""The reader of CTranslate2 files, on a small file written here."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kimi_mm.audio.encoder import AudioEncoder
from kimi_mm.config import AudioEncoderConfig
from kimi_mm.conversion.whisper import encoder_state, extract_whisper_encoder, read_variables
from kimi_mm.errors import CheckpointError

D, M, FFN = 8, 6, 12
CODES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def variables() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def linear(name: str, rows: int, columns: int) -> dict[str, np.ndarray]:
        return {f"{name}/weight": rng.standard_normal((rows, columns)), f"{name}/bias": rng.standard_normal(rows)}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}/gamma": rng.standard_normal(D), f"{name}/beta": rng.standard_normal(D)}

    found = {
        "encoder/conv1/weight": rng.standard_normal((D, M, 3)),
        "encoder/conv1/bias": rng.standard_normal(D),
        "encoder/conv2/weight": rng.standard_normal((D, D, 3)),
        "encoder/conv2/bias": rng.standard_normal(D),
        "encoder/position_encodings/encodings": rng.standard_normal((4, D)),
        **norm("encoder/layer_norm"),
        **norm("decoder/layer_norm"),
    }
    for layer in range(2):
        prefix = f"encoder/layer_{layer}"
        found |= norm(f"{prefix}/self_attention/layer_norm") | linear(f"{prefix}/self_attention/linear_0", 3 * D, D)
        found |= linear(f"{prefix}/self_attention/linear_1", D, D) | norm(f"{prefix}/ffn/layer_norm")
        found |= linear(f"{prefix}/ffn/linear_0", FFN, D) | linear(f"{prefix}/ffn/linear_1", D, FFN)
    return {name: array.astype(np.float16) for name, array in found.items()} | {
        "encoder/num_heads": np.array(2, np.int16)
    }


def encode(found: dict[str, np.ndarray], version: int = 6, architecture: str = "WhisperSpec") -> bytes:
    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    data = struct.pack("<I", version) + string(architecture) + struct.pack("<II", 3, len(found))
    for name, value in found.items():
        array = np.asarray(value)
        data += string(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += struct.pack("<BI", CODES[array.dtype.name], array.nbytes) + array.tobytes()
    return data + struct.pack("<I", 0)


@pytest.fixture
def model_bin(tmp_path: Path) -> Path:
    path = tmp_path / "model.bin"
    path.write_bytes(encode(variables()))
    return path


def test_extracted_encoder_loads(model_bin: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "encoder.safetensors"
    extract_whisper_encoder(model_bin, out)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    state = load_file(out)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    config = AudioEncoderConfig(hidden_size=D, num_layers=2, num_heads=2, intermediate_size=FFN, max_positions=4)
    AudioEncoder(config.replace(block_size=None), M).load_state_dict(state, strict=True)


def test_queries_keys_and_values_are_the_thirds(model_bin: Path) -> None:
    state, raw = encoder_state(model_bin), variables()
    for name, rows in (("q_proj", slice(0, D)), ("k_proj", slice(D, 2 * D)), ("v_proj", slice(2 * D, 3 * D))):
        fused = raw["encoder/layer_1/self_attention/linear_0/weight"]
        assert np.array_equal(state[f"layers.1.self_attn.{name}.weight"].numpy(), fused[rows])
    assert "layers.1.self_attn.k_proj.bias" not in state
    assert np.array_equal(
        state["layers.0.self_attn_layer_norm.weight"].numpy(), raw["encoder/layer_0/self_attention/layer_norm/gamma"]
    )
    assert np.array_equal(state["layers.0.fc2.bias"].numpy(), raw["encoder/layer_0/ffn/linear_1/bias"])


def test_every_cut_is_noticed(model_bin: Path, tmp_path: Path) -> None:
    data, short = model_bin.read_bytes()[:-4], tmp_path / "short.bin"
    for size in [0, 3, 5, 17, 22, 26, *range(30, len(data), 97), len(data) - 1]:
        short.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"short\.bin"):
            list(read_variables(short))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (encode(variables(), version=5), "format 6"),
        (encode(variables(), architecture="TransformerSpec"), "format 6"),
        (encode({"decoder/layer_norm/gamma": np.ones(3, np.float16)}), "no Whisper encoder"),
        (encode({"encoder/conv1/weight": np.ones((2, 2), np.int8)}), "is quantized"),
        (encode({"x": np.ones(3, np.float16)}).replace(b"\x04\x06\0\0\0", b"\x04\xff\xff\xff\xff"), "impossible size"),
        (encode({"x": np.ones(3, np.float16)}).replace(b"\x04\x06\0\0\0", b"\x09\x06\0\0\0"), "impossible size"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        encoder_state(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(read_variables(tmp_path / "none.bin"))
