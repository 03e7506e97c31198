"""Drawn batches: any number of processes gives the same ones, and none of them outlives its trainer."""

import collections
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch

from kimi_mm.config import VocabConfig
from kimi_mm.data.art import ART
from kimi_mm.data.drawing import COLORS, SHAPES
from kimi_mm.data.loader import NOT_MINE, Prefetcher
from kimi_mm.data.scene_drawer import SceneDrawer, carve, cut_patches
from kimi_mm.data.scene_loader import SceneLoader
from kimi_mm.data.slots import Slots
from kimi_mm.processing import IGNORE, Processor
from kimi_mm.text.tokenizer import TextTokenizer
from kimi_mm.training.vision_config import SceneDataConfig
from kimi_mm.vision.processing import patchify

TEXTS = ["what is in the picture? a red ball and two dogs.", "how many cats are there? three."]


def settings(art_folder, **changes):
    cells = {"cells": (6, 16), "cell_shares": (0.5, 0.5), "grids": 3, "batch_positions": 300}
    return SceneDataConfig(art=str(art_folder / ART), **cells, **changes)


def processor(lead=True):
    tokenizer = TextTokenizer.from_json(TextTokenizer.train(TEXTS, 300).to_json(), lead)
    return Processor(VocabConfig(num_text_tokens=300, num_audio_codes=16), tokenizer)


def same(one, other):
    fields = ("patches", "text_ids", "audio_ids", "vision_at", "shown", "positions", "labels")
    return one.grids == other.grids and all(torch.equal(getattr(one, f), getattr(other, f)) for f in fields)


@pytest.mark.parametrize("lead", [True, False])
def test_workers_draw_the_batches_of_one_process(art_folder, lead):
    alone = iter(SceneLoader(settings(art_folder, processes=0), processor(lead), seed=5))
    loader = SceneLoader(settings(art_folder, processes=2), processor(lead), seed=5)
    together, held = iter(loader), []
    for _ in range(9):  # more than there are slots: what was handed out must not change
        held.append((next(together), next(alone)))
    assert all(same(*pair) for pair in held)
    assert len({batch.grids for batch, _ in held}) == 2
    assert loader.state_dict() == {"epoch": 0, "cursor": 9}
    together.close()


def test_a_place_is_restored_and_batches_are_dealt(art_folder):
    plain = iter(SceneLoader(settings(art_folder, processes=0), processor(), seed=5))
    wanted = [next(plain) for _ in range(8)]
    loader = SceneLoader(settings(art_folder, processes=1), processor(), seed=5)
    loader.group, loader.groups = 1, 2
    loader.load_state_dict({"epoch": 0, "cursor": 2})
    source = iter(loader)
    found = [next(source) for _ in range(6)]
    assert [batch is NOT_MINE for batch in found] == [True, False] * 3
    assert all(same(found[i], wanted[2 + i]) for i in (1, 3, 5))
    source.close()


def test_arrays_in_given_memory(art_folder):
    drawer = SceneDrawer(settings(art_folder), processor(), seed=1)
    bucket = drawer.bucket(3)
    memory = np.full(bucket.nbytes + 100, 7, np.uint8)
    drawn, again = drawer.draw(3, memory), drawer.draw(3)
    views = carve(memory, bucket, len(again.labels))
    for name, array in vars(again).items():
        assert np.array_equal(getattr(drawn, name), array), name
        assert np.shares_memory(getattr(drawn, name), memory)
        assert np.array_equal(getattr(views, name), array), name
    assert (memory[-100:] == 7).all()
    assert len(drawn.vision_at) == bucket.patches // 4
    assert (drawn.labels != IGNORE).all()


def test_rows_say_what_they_show(art_folder):
    """Every row has the ids of a thing's name, a colour or letters, in the order in which the rows lie."""
    drawer = SceneDrawer(settings(art_folder, kinds={"several": 1.0}), processor(), seed=1)
    drawn, bucket = drawer.draw(0), drawer.bucket(0)
    tokenizer = processor().tokenizer
    words = [tokenizer.decode(ids[ids != IGNORE].tolist()) for ids in drawn.shown]
    known = (*drawer.art.things, *COLORS, *(f"{color} {shape}" for color in COLORS for shape in SHAPES))
    assert all(any(name.startswith(word) for name in known) for word in words)  # a long name loses its end
    _, h, w = bucket.grids[0]
    cells = drawn.patches[: h * w].reshape(h // 2, 2, w // 2, 2, 3, 14, 14).swapaxes(1, 2).reshape(h * w // 4, -1)
    plain = [np.ptp(cell.reshape(4, 3, -1), axis=(0, 2)).max() for cell in cells]
    names = [bool(word) and word not in COLORS for word in words[: h * w // 4]]
    assert np.mean([p for p, n in zip(plain, names, strict=True) if n]) > np.mean(plain)


def test_what_is_read_is_answered_letter_by_letter(art_folder):
    layout = processor()
    settings = SceneDataConfig(
        **{"cells": (50, 90), "cell_shares": (0.0, 1.0), "grids": 9, "batch_positions": 2400, "max_questions": 1},
        **{"art": str(art_folder / ART), "kinds": {"page": 1.0}, "questions": ("line",)},
    )
    drawer = SceneDrawer(settings, layout, seed=1)
    drawn, eos = drawer.draw(0), layout.ids["text_eos"]
    answers = [part[part != eos].tolist() for part in np.split(drawn.labels, np.flatnonzero(drawn.labels == eos) + 1)]
    said = [(ids, layout.tokenizer.decode(ids)) for ids in answers if ids]
    said = [(ids, text) for ids, text in said if not text.endswith(".")]  # where the page was too small for words
    assert len(said) > 5
    assert all(ids == layout.tokenizer.encode_letters(text) for ids, text in said)
    assert any(ids != layout.tokenizer.encode(text) for ids, text in said)


def test_patches_are_those_of_the_processor():
    canvas = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
    cut = torch.from_numpy(cut_patches(canvas)).float().div(255.0).sub(0.5).div(0.5)
    torch.testing.assert_close(cut, patchify(torch.from_numpy(canvas)[None], 14))


def test_slots_are_apart():
    slots = Slots(2, 100)
    slots[0][:] = 1
    slots[1][:100] = 2
    assert (slots[0] == 1).all()
    assert (slots[1][:100] == 2).all()
    assert len(slots[0]) >= 100


def test_workers_do_without_torch():
    code = "import kimi_mm.data.scene_worker, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


TRAINER = """
import multiprocessing, pathlib, signal, sys, time
from kimi_mm.data.loader import Prefetcher
from kimi_mm.data.scene_loader import SceneLoader
from tests.data.test_scene_loader import processor, settings

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the suite runs in the background
    source = Prefetcher(SceneLoader(settings(pathlib.Path(sys.argv[1]), processes=2), processor(), seed=5))
    try:
        source.next()
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(100)
    finally:
        source.close()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_the_trainer(art_folder, tmp_path, how):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER, encoding="utf-8")
    trainer = subprocess.Popen(
        [sys.executable, str(script), str(art_folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert trainer.stdout is not None
    workers = [int(word) for word in trainer.stdout.readline().split()]
    assert len(workers) == 2
    trainer.send_signal(how)
    trainer.communicate(timeout=30)
    assert trainer.returncode != 0
    deadline = time.monotonic() + 20
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, workers))


def test_a_worker_that_dies_is_an_error(art_folder):
    source = Prefetcher(SceneLoader(settings(art_folder, processes=1), processor(), seed=5))
    source.next()
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(BrokenProcessPool):
        collections.deque(iter(source.next, None), maxlen=0)
    source.close()


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
