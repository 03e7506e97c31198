import json
from pathlib import Path

import numpy as np
import pytest

from kimi_mm.data.manifest import ManifestError, read_manifest, read_rows, resolve, write_manifest, write_rows
from kimi_mm.data.shards import Clip, read_shards, shard_path, write_shards


def clips(count: int) -> list[Clip]:
    rng = np.random.default_rng(0)
    return [
        Clip(f"id{i}", f"text {i}", "voice", rng.integers(-9, 9, rng.integers(1, 50)).astype(np.int16))
        for i in range(count)
    ]


def test_shards_round_trip(tmp_path: Path) -> None:
    written = clips(7)
    assert write_shards(tmp_path, written, per_shard=3) == 7
    assert len(list(tmp_path.glob("shard-*.npy"))) == 3
    for before, after in zip(written, read_shards(tmp_path), strict=True):
        assert (before.id, before.text, before.voice) == (after.id, after.text, after.voice)
        np.testing.assert_array_equal(before.wave, after.wave)
    manifest = read_manifest(tmp_path, "speech", verify=True)
    assert len(manifest.files) == 6
    assert manifest.meta["utterances"] == 7


def test_damage_is_found(tmp_path: Path) -> None:
    write_shards(tmp_path, clips(2))
    array = shard_path(tmp_path, 0).with_suffix(".npy")
    data = bytearray(array.read_bytes())
    data[-1] ^= 1
    array.write_bytes(data)
    read_manifest(tmp_path)
    with pytest.raises(ManifestError, match=r"'shard-00000\.npy' differs"):
        read_manifest(tmp_path, verify=True)
    array.write_bytes(data[:-2])
    with pytest.raises(ManifestError, match="differs from its checksum"):
        read_manifest(tmp_path)
    with pytest.raises(ManifestError, match=r"shard-00000\.npy: cannot be read|lie outside"):
        list(read_shards(tmp_path))
    array.unlink()
    with pytest.raises(ManifestError, match=r"'shard-00000\.npy' is missing"):
        read_manifest(tmp_path)


def test_an_index_outside_its_array_names_the_line(tmp_path: Path) -> None:
    write_shards(tmp_path, clips(2))
    index = shard_path(tmp_path, 0)
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    rows[1]["samples"] += 1
    write_rows(index, rows)
    with pytest.raises(ManifestError, match=r"shard-00000\.jsonl:2: samples"):
        list(read_shards(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: not valid JSON"),
        ("[1]", ":2: expected an object"),
        ('{"text": "a"}', ":2: missing key 'id'"),
        ('{"id": 3, "text": "a"}', ":2: 'id' must be str"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "text": "b"}\n' + line + "\n")
    with pytest.raises(ManifestError, match=f"rows.jsonl{message}"):
        list(read_rows(path, {"id": str, "text": str}))


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "link/x", "", 3, "a\\..\\x", "a\0b"])
def test_paths_stay_inside(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(ManifestError, match=r"f\.jsonl:4"):
        resolve(folder, name, "f.jsonl:4")
    assert resolve(folder, "a/b.flac", "f.jsonl:4") == folder / "a" / "b.flac"


def test_manifests_of_another_kind_or_none(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="prepare the data first"):
        read_manifest(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    write_manifest(tmp_path, "clips", [tmp_path / "a.txt"])
    with pytest.raises(ManifestError, match="holds 'clips' data, but 'speech'"):
        read_manifest(tmp_path, "speech")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ManifestError, match="not valid JSON"):
        read_manifest(tmp_path)
    with pytest.raises(ManifestError, match="no speech shards"):
        list(read_shards(tmp_path))
