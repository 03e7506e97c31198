"""Programs over pictures: what they mean, what they may not do, and samples whose answers are true."""

import json

import numpy as np
import pytest

from kimi_mm.data.art import Art
from kimi_mm.data.debug import write_debug_art
from kimi_mm.data.programs.interpreter import OPERATIONS, run
from kimi_mm.data.programs.language import Call, Name, Number, ProgramError, String, parse
from kimi_mm.data.programs.samples import sample, write_samples
from kimi_mm.data.programs.seers import PixelSeer, SceneSeer
from kimi_mm.data.scenes import Scene, Thing, compose


@pytest.fixture(scope="module")
def scene():
    """Two red balls and a blue box on white, and a word."""
    image = np.full((80, 120, 3), 250, np.uint8)
    things = []
    for name, color, box in [
        ("ball", "red", (5, 10, 25, 30)),
        ("ball", "red", (80, 50, 110, 80)),
        ("box", "blue", (60, 5, 100, 25)),
    ]:
        left, top, right, bottom = box
        image[top:bottom, left:right] = {"red": (220, 20, 20), "blue": (30, 60, 220)}[color]
        things.append(Thing(name, box, color))
    return Scene("shapes", image, "white", things, text=("STOP",))


def answer(program, seer):
    return run(program, seer).answer


def test_lines_become_trees():
    (line,) = parse("a = crop(image, 1 + 2 * 3, 0, 8, -4)  # a comment")
    product = Call("*", (Number(2.0), Number(3.0)))
    assert line.target == "a"
    assert line.value.arguments[:2] == (Name("image"), Call("+", (Number(1.0), product)))
    assert line.value.arguments[4] == Call("-", (Number(0.0), Number(4.0)))
    assert parse("\n\nprint('x')")[0].number == 3
    assert parse("'x'")[0].value == String("x")


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        ('answer(count(image, "ball"))', "2"),
        ('answer(count(image, "red ball"))', "2"),
        ('answer(count(crop(image, 0, 0, 60, 80), "ball"))', "1"),
        ('answer(width(find(image, "box")))', "40"),
        ('a = zoom(find(image, "box"), 3)\nanswer(width(a))', "120"),
        ("a = zoom(image, 2)\nb = crop(a, 120, 10, 200, 50)\nanswer(color(b))", "blue"),
        ("answer(color(image))", "white"),
        ("answer(read(image))", "STOP"),
        ('answer(bigger(left(find(image, "box")), left(find(image, "ball"))))', "yes"),
        ("answer((1 + 2) * 3 / 4 - 1)", "1.25"),
        ('answer(equal(color(image), "white"))', "yes"),
        ("print(1)\nprint(image)", ""),
    ],
)
def test_programs_over_the_truth(scene, program, wanted):
    assert answer(program, SceneSeer(scene)) == wanted


def test_programs_over_pixels_alone(scene):
    seer = PixelSeer(scene.image, reader=lambda pixels: f"{pixels.shape[1]}x{pixels.shape[0]}")
    assert answer('answer(count(image, "red"))', seer) == "2"
    assert answer('answer(count(crop(image, 0, 0, 60, 80), "red"))', seer) == "1"
    assert answer('answer(width(find(image, "blue")))', seer) == "40"
    assert float(answer('answer(share(image, "blue"))', seer)) == pytest.approx(40 * 20 / 9600, abs=1e-3)
    assert answer("answer(read(crop(image, 0, 0, 30, 20)))", seer) == "30x20"
    large = PixelSeer(np.repeat(np.repeat(scene.image, 8, 0), 8, 1))
    assert answer('answer(count(image, "red"))', large) == "2"
    with pytest.raises(ProgramError, match="nothing here can read"):
        answer("answer(read(image))", PixelSeer(scene.image))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("", "empty"),
        ("import os", "line 1: 'os' was not expected"),
        ("a.b", "not part of the language"),
        ("__import__('os')", "no operation '__import__'"),
        ("evaluate(1)", "no operation 'evaluate'"),
        ("call(1)", "no operation 'call'"),
        ("x = [1]", "not part of the language"),
        ("a = crop(image, 0, 0, 999, 10)", "line 1: crop.*120 x 80"),
        ("\ncount(image)", "line 2: count takes 2 values, not 1"),
        ("count(1, 'ball')", "wants a picture, not a number"),
        ("width = 3", "is an operation"),
        ("b", "'b' has no value"),
        ("1 / 0", "division by zero"),
        ("find(image, 'cow')", "no 'cow'"),
        ("share(image, 'mauve')", "'mauve' is not a colour"),
        ("zoom(image, 1000)", "zoom takes a factor"),
        ("(1", r"'\)' is missing"),
        ("crop(image,", "ends too early"),
        ("9" * 400, "beyond 1e"),
        ("999999999 * 999999999", "beyond 1e"),
        ("(" * 40 + "1" + ")" * 40, "nested more than"),
        ("-" * 100 + "1", "nested more than"),
        ("1" + "+1" * 1500, "at most 200"),
        ("x = 1\n" * 70, "at most 64 lines"),
        ("x" * 5000, "at most 4000"),
        ("print('" + "y" * 300 + "')\n" + "print('" + "y" * 300 + "')", "500 characters of output"),
    ],
)
def test_what_programs_may_not_do(scene, program, message):
    with pytest.raises(ProgramError, match=message):
        run(program, SceneSeer(scene))


def test_steps_are_bounded(scene):
    with pytest.raises(ProgramError, match="more than 2000 steps"):
        run("\n".join(["+".join("1" * 30)] * 64), SceneSeer(scene))


def test_every_operation_exists(scene):
    from kimi_mm.data.programs.interpreter import _Machine

    assert all(callable(getattr(_Machine(SceneSeer(scene)), f"_{name}")) for name in OPERATIONS)


@pytest.fixture(scope="module")
def art(tmp_path_factory):
    return Art(write_debug_art(tmp_path_factory.mktemp("art")))


def test_samples_hold_no_picture_and_are_true(art, tmp_path):
    write_samples(tmp_path / "a.jsonl", art, 40, seed=3)
    write_samples(tmp_path / "b.jsonl", art, 40, seed=3)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        roles = [message["role"] for message in json.loads(line)["messages"]]
        assert roles == ["user", "assistant", "system", "assistant"]
        assert all(isinstance(message["content"], str) for message in json.loads(line)["messages"])
    found = [sample(art, np.random.default_rng((0, 3, n))) for n in range(60)]
    assert {messages[1]["content"].split("(")[0] for messages in found if messages} >= {
        "answer",
        "a = find",
        "a = crop",
    }


def test_counts_agree_with_the_scene(art):
    for seed in range(5):
        scene = compose(art, "count", (140, 140), np.random.default_rng(seed))
        for name in {thing.name for thing in scene.things}:
            want = sum(thing.name == name for thing in scene.things)
            assert answer(f'answer(count(image, "{name}"))', SceneSeer(scene)) == str(want)
