"""Scenes are pure functions of their seeds, keep to their split, and their truth is what was drawn."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from kimi_mm.data.art import ART, HELD_OUT, Art, held_out
from kimi_mm.data.digits import coarse_digit, coarse_picture, written_digit
from kimi_mm.data.drawing import COLORS, SHAPES, distance, outlined, pick, pick_rgb, shape_icon, widened
from kimi_mm.data.numbers import cardinal
from kimi_mm.data.scenes import KINDS, MAX_COUNT, Scene, Thing, compose, compositions, fits, shown
from kimi_mm.data.writing import SMALLEST, Letter, ink_for

SIZES = [(56, 56), (84, 300), (224, 150), (112, 112), (455, 471), (28, 90)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_scene(art, kind):
    one, two = (compose(art, kind, (120, 150), np.random.default_rng((3, 4))) for _ in range(2))
    assert np.array_equal(one.image, two.image)
    assert (one.things, one.text, one.background) == (two.things, two.text, two.background)
    assert not np.array_equal(one.image, compose(art, kind, (120, 150), np.random.default_rng(5)).image)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_every_size_that_fits(art, kind):
    for number, size in enumerate(SIZES):
        if not fits(kind, size):
            continue
        for test in (False, True):
            scene = compose(art, kind, size, np.random.default_rng((number, test)), test=test)
            assert scene.image.shape == (*size, 3)
            assert scene.image.dtype == np.uint8
            assert scene.background in COLORS
            assert bool(scene.text) == (kind in ("text", "page", "digit", "number"))
            for thing in scene.things:
                left, top, right, bottom = thing.box
                assert 0 <= left < right <= size[1]
                assert 0 <= top < bottom <= size[0]
            written = "".join(letter.character for letter in scene.letters)
            assert written == "".join(scene.text).replace(" ", "")
            for a, b in combinations(scene.things, 2):
                apart = a.box[2] <= b.box[0] or b.box[2] <= a.box[0] or a.box[3] <= b.box[1] or b.box[3] <= a.box[1]
                assert apart, (a, b)


def test_training_never_shows_what_is_held_out(art):
    seen = Counter()
    for number in range(500):
        kind = list(KINDS)[number % 6]
        scene = compose(art, kind, (200, 200), np.random.default_rng((1, number)))
        for parts in compositions(scene):
            # Letters that make no word may be any.
            if parts[0] != "word" or parts[1] in art.words:
                assert not held_out(*parts), (kind, parts)
                seen[parts[0]] += 1
    assert min(seen[kind] for kind in ("pair", "background", "shape", "count", "word")) > 20


def test_tests_show_something_held_out(art):
    wanted = {
        "several": "pair",
        "line": "pair",
        "count": "count",
        "shapes": "shape",
        "text": "word",
        "one": "background",
    }
    shown = Counter()
    for number in range(120):
        kind = list(wanted)[number % 6]
        scene = compose(art, kind, (200, 200), np.random.default_rng((2, number)), test=True)
        shown[kind] += any(held_out(*parts) for parts in compositions(scene) if parts[0] == wanted[kind])
    assert min(shown.values()) >= 19


def test_icons_lie_where_the_truth_says(art):
    scene = compose(art, "one", (160, 160), np.random.default_rng(8), test=True)
    left, top, right, bottom = scene.things[0].box
    inside = np.zeros((160, 160), bool)
    inside[top:bottom, left:right] = True
    middle = scene.image[(top + bottom) // 2, (left + right) // 2].astype(int)
    outside = scene.image[~inside].astype(int).mean(0)
    assert np.abs(middle - outside).sum() > 60


def test_counts_and_lines(art):
    most = 0
    for number in range(60):
        scene = compose(art, "count", (300, 300), np.random.default_rng((3, number)))
        counts = Counter(thing.name for thing in scene.things)
        most = max(most, counts.most_common(1)[0][1])
        assert len(counts) <= 2
        line = compose(art, "line", (150, 150), np.random.default_rng((4, number)))
        axis = 0 if line.layout == "row" else 1
        centers = [thing.center[axis] for thing in line.things]
        assert centers == sorted(centers)
        assert len(line.things) == 3
    assert most == MAX_COUNT


def test_tests_show_the_held_out_style_undisturbed(art_folder):
    style = Art(art_folder / HELD_OUT)
    one, two = (compose(style, "one", (96, 96), np.random.default_rng(1), test=True) for _ in range(2))
    assert np.array_equal(one.image, two.image)
    assert all(name.startswith("icons/other/") for _, name in style.things["dog"].icons)
    plain = compose(Art(art_folder / ART), "one", (96, 96), np.random.default_rng(1), test=True)
    assert plain.things[0].name == one.things[0].name


def test_words_stay_inside_the_picture(art):
    for number in range(80):
        rng = np.random.default_rng((6, number))
        scene = compose(art, "text", (60, int(rng.integers(84, 200))), rng, test=number % 2 == 1)
        text = " ".join(scene.text)
        assert text == text.strip() != ""
        if number % 2:
            assert all(held_out("word", word.lower()) for word in text.split())
    assert SMALLEST >= 14  # a patch


def test_colours_go_by_their_names():
    rng = np.random.default_rng(0)
    shades = {name: np.asarray([pick_rgb(name, rng) for _ in range(200)], np.float32) for name in COLORS}
    centers = {name: values.mean(0) for name, values in shades.items()}
    for name, values in shades.items():
        nearest = [min(centers, key=lambda other: float(np.linalg.norm(v - centers[other]))) for v in values]
        assert np.mean([near == name for near in nearest]) > 0.9, name
    for _ in range(100):
        paper = tuple(int(v) for v in rng.integers(0, 256, 3))
        assert distance(ink_for(paper, rng), paper) > 60


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_drawn_upright_and_whole(shape):
    icon = np.asarray(shape_icon(shape, (10, 200, 30), 60, np.random.default_rng(1)))
    ink = icon[..., 3] > 128
    assert icon.shape == (60, 60, 4)
    assert (icon[ink][:, :3] == (10, 200, 30)).all()
    assert 0.12 < ink.mean() < 0.85
    if shape in ("triangle", "heart"):
        upper, lower = ink[16].sum(), ink[40].sum()
        assert (upper < lower) == (shape == "triangle")


def test_outlines_are_dark_and_keep_the_silhouette():
    icon = shape_icon("circle", (250, 220, 40), 96, np.random.default_rng(0))
    drawn = np.asarray(outlined(icon))
    assert np.array_equal(drawn[..., 3], np.asarray(icon)[..., 3])
    row = drawn[48][drawn[48][:, 3] > 200][:, :3].astype(int).sum(1)
    assert row[1] < 150 < row[len(row) // 2]


def test_written_digits_differ_from_hand_to_hand():
    rng = np.random.default_rng(0)
    for digit in range(10):
        counts = np.asarray([coarse_digit(digit, rng) for _ in range(12)])
        assert counts.shape == (12, 8, 8)
        assert counts.max() == 16
        assert (counts.sum((1, 2)) > 60).all()
        assert counts.std(0).max() > 3
        ink = written_digit(digit, 50, rng)
        assert ink.shape == (50, 50)
        assert ink.max() > 200
    assert coarse_picture(counts[0], 112).size == (112, 112)


def test_bad_arguments(art):
    with pytest.raises(ValueError, match="scene kind 'opera'"):
        compose(art, "opera", (100, 100), np.random.default_rng(0))
    with pytest.raises(ValueError, match="at least 28"):
        compose(art, "one", (20, 100), np.random.default_rng(0))


@pytest.mark.parametrize(("shape", "reach"), [((30, 30), 1), ((40, 25), 6), ((3, 9), 7), ((1, 5), 2)])
def test_rims_are_those_of_a_filter(shape, reach):
    mask = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    inside = [np.s_[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] for y, x in np.ndindex(shape)]
    assert np.array_equal(widened(mask, reach).flatten(), [mask[part].max() for part in inside])


def test_picks_are_those_of_choice():
    ours, theirs = (np.random.default_rng(4) for _ in range(2))
    for shares in ((0.4, 0.3, 0.3), (1.0,), (0.0, 2.0, 5.0)):
        p = np.asarray(shares) / sum(shares)
        assert [pick(ours, shares) for _ in range(200)] == theirs.choice(len(shares), 200, p=p).tolist()


def test_letters_are_where_their_ink_is(art):
    """Each letter's box differs from the paper around it; a box with nothing in it would teach the eyes to invent."""
    empty = total = 0
    for seed in range(40):
        scene = compose(art, "text", (112, 224), np.random.default_rng(seed), test=True)
        for letter in scene.letters:
            left, top, right, bottom = letter.box
            inside = scene.image[max(0, top) : bottom, max(0, left) : right].astype(int)
            total += 1
            empty += inside.size == 0 or np.ptp(inside, axis=(0, 1)).max() < 60
    assert total > 200
    assert empty / total < 0.02


def test_what_each_cell_shows():
    things = [Thing("dog", (0, 0, 28, 28)), Thing("ring", (40, 0, 84, 40), "red"), Thing("ant", (30, 60, 34, 64))]
    letters = [Letter("a", (60, 58, 66, 70)), Letter("b", (66, 58, 72, 70))]
    image = np.zeros((70, 100, 3), np.uint8)
    scene = Scene("several", image, "blue", things, letters=letters)
    assert shown(scene, 4, 5, 28) == [
        *(["dog"], ["red ring"], ["red ring"], ["blue"], []),
        *(["blue"], ["blue"], ["red ring"], ["blue"], []),
        *(["blue"], ["ant"], ["a", "b"], ["blue"], []),
        *([[]] * 5),
    ]


def test_things_of_one_name_are_numbered_as_one_reads(art):
    boxes = [(60, 0, 80, 20), (0, 60, 20, 80), (0, 0, 20, 20)]
    scene = Scene("count", np.zeros((84, 84, 3), np.uint8), "blue", [Thing("dog", box) for box in boxes])
    scene.things.append(Thing("ant", (30, 30, 50, 50)))
    cells = shown(scene, 3, 3, 28)
    numbered = {at: words for at, words in enumerate(cells) if words != ["blue"]}
    assert numbered == {0: ["dog", "one"], 2: ["dog", "two"], 4: ["ant"], 6: ["dog", "three"]}
    drawn = compose(art, "count", (280, 280), np.random.default_rng(5))
    number = Counter(thing.full_name for thing in drawn.things).most_common(1)[0][1]
    numbers = [words[i] for words in shown(drawn, 10, 10, 28) for i in range(1, len(words))]
    assert numbers == [cardinal(i) for i in range(1, number + 1)]


@pytest.mark.parametrize("test", [False, True])
def test_pages_are_full_of_words(art, test):
    many = 0
    for seed in range(12):
        scene = compose(art, "page", (150, 240), np.random.default_rng(seed), test=test)
        assert "".join(letter.character for letter in scene.letters) == "".join(scene.text).replace(" ", "")
        boxes = np.asarray([letter.box for letter in scene.letters])
        assert boxes.min() >= 0
        assert (boxes[:, 2:].max(0) <= (240 + 4, 150 + 4)).all()
        words = {word.lower() for word in " ".join(scene.text).split()} & set(art.words)
        assert all(held_out("word", word) == test for word in words)
        many += len(scene.letters)
    assert many > 12 * 30
