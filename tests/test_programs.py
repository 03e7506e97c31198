"""Answers by programs: a tiny model is taught a few by heart, and has to look at pictures that it never saw."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

import kimi_mm
from kimi_mm.cli.main import run
from kimi_mm.data.drawing import COLORS
from kimi_mm.data.programs.eyes import MAX_LOOKS, EyesSeer
from kimi_mm.data.programs.interpreter import run as run_program
from kimi_mm.data.programs.language import ProgramError
from kimi_mm.errors import UserError
from kimi_mm.evaluation.vision import by_programs
from kimi_mm.programs import answer_by_programs
from kimi_mm.training.run import train

COUNT, MIDDLE, SHARE, ENDLESS = "How many red?", "Middle color?", "How much mauve?", "Go on."
REFUSED = f"'mauve' is not a colour; there are {', '.join(COLORS)}."


def lesson(question: str, *turns: str) -> dict:
    messages = [{"role": "user", "content": f"The picture image has 60 x 40 pixels. {question}"}]
    messages += [{"role": ("assistant", "system")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"messages": messages}


LESSONS = [
    *(lesson(COUNT, 'answer(count(image, "red"))', str(n), f"{word}.") for n, word in enumerate(("No", "One", "Two"))),
    *(
        lesson(MIDDLE, "a = crop(image, 20, 10, 40, 30)\nanswer(color(a))", color, f"{color}!")
        for color in ("red", "blue")
    ),
    lesson(SHARE, 'share(image, "mauve")', REFUSED, "answer(1)", "1", "None."),
    lesson(ENDLESS, "answer(2)", "2", "answer(2)", "2", "answer(2)"),
]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A checkpoint that knows the lessons, whose pictures were never shown."""
    folder = tmp_path_factory.mktemp("taught")
    data = folder / "lessons.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in LESSONS))
    sizes = ["data.batch_positions=2048", "steps=150", "save_every=150", "log_every=50", "weights=fp32"]
    rates = [
        "optim={lr: 6e-3, warmup_steps: 10, schedule: cosine, betas: [0.9, 0.95], weight_decay: 0.0}",
        "freeze=[vision]",
    ]
    numbers = train("sft/nano-zero-vision", debug=True, output=folder / "run", overrides=[*sizes, *rates], data=[data])
    assert numbers["loss"] < 0.05
    return folder / "run" / "model"


@pytest.fixture(scope="module")
def engine(taught):
    return kimi_mm.load(taught)


def picture(reds: int, middle: str | tuple[int, int, int] = "white") -> Image.Image:
    image = Image.new("RGB", (60, 40), "white")
    draw = ImageDraw.Draw(image)
    if middle != "white":
        draw.rectangle((18, 8, 42, 32), fill=middle)
    for number in range(reds):
        draw.rectangle((2 + 44 * number, 2, 12 + 44 * number, 12), fill=(220, 20, 20))
    return image


def turns(engine, image, question, **options):
    return [(t.kind, t.text) for t in answer_by_programs(engine, image, question, show=False, **options)]


@pytest.mark.parametrize(("reds", "answer"), [(0, "No."), (1, "One."), (2, "Two.")])
def test_the_answer_follows_from_what_the_program_found(engine, reds, answer):
    found = turns(engine, picture(reds), COUNT)
    assert found == [("program", 'answer(count(image, "red"))'), ("result", str(reds)), ("answer", answer)]


@pytest.mark.parametrize("color", ["red", "blue"])
def test_parts_are_looked_at(engine, color):
    found = turns(engine, np.asarray(picture(0, {"red": (220, 20, 20), "blue": (30, 60, 220)}[color])), MIDDLE)
    assert found[1:] == [("result", color), ("answer", f"{color}!")]


def test_a_refusal_goes_back_to_the_model_which_tries_again(engine):
    found = turns(engine, picture(0), SHARE)
    assert [kind for kind, _ in found] == ["program", "refusal", "program", "result", "answer"]
    assert found[1][1] == REFUSED
    assert found[-1] == ("answer", "None.")


def test_programs_and_their_time_are_bounded(engine):
    with pytest.raises(UserError, match="no answer after 2 programs; the last one gave: 2"):
        turns(engine, picture(0), ENDLESS, max_programs=2)
    late = answer_by_programs(engine, picture(0), ENDLESS, show=False, max_seconds=-1.0)
    assert next(late).kind == "program"
    assert "takes longer" in next(late).text


def test_models_with_eyes_are_shown_the_picture(engine):
    shown = [turn.kind for turn in engine.describe_by_programs(picture(1), COUNT, max_programs=1, max_tokens=4)]
    assert shown[-1] == "answer"  # nobody taught it with pictures, so what it says is noise, but it goes through
    with pytest.raises(UserError, match="question is empty"):
        next(engine.describe_by_programs(picture(1), " "))


def call(capfd, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        run(list(map(str, arguments)))
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return int(stopped.value.code or 0), out, err


@pytest.fixture
def blind(engine, monkeypatch):
    """The command's model, without eyes, so that it is asked as it was taught."""
    monkeypatch.setattr(engine.processor, "vision", None)
    monkeypatch.setattr(kimi_mm, "load", lambda name, device="cpu": engine, raising=False)
    return engine


def test_describe_shows_programs_and_answers(blind, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(2).save("two.png")
    picture(0).save("none.png")
    code, out, err = call(capfd, "describe", "two.png", COUNT, "--programs")
    assert (code, out) == (0, "Two.\n")
    assert err.splitlines() == ['program: answer(count(image, "red"))', "result: 2"]
    code, out, _ = call(capfd, "describe", "two.png", COUNT, "--programs", "--json")
    row = json.loads(out)
    assert row["text"] == "Two."
    assert row["programs"][1] == {"kind": "result", "text": "2"}
    code, out, err = call(capfd, "describe", "two.png", "missing.png", "none.png", COUNT, "--programs", "--each")
    assert (code, out) == (1, "two.png: Two.\nnone.png: No.\n")
    assert "missing.png" in err
    for wrong in (("two.png",), ("two.png", "none.png", COUNT), ("two.png", COUNT, "--explain", "x.png")):
        assert call(capfd, "describe", *wrong, "--programs")[0] == 2
    code, out, err = call(capfd, "describe", "two.png", ENDLESS, "--programs")
    assert (code, out) == (1, "")
    assert "no answer after 4 programs" in err


def test_evaluation_takes_no_answer_as_a_wrong_one(blind, tmp_path):
    picture(1).save(tmp_path / "one.png")
    assert by_programs(blind, tmp_path / "one.png", COUNT) == "One."
    assert by_programs(blind, tmp_path / "one.png", ENDLESS) == ""


# ---- eyes ---------------------------------------------------------------------------------------------------------


class Looker:
    """Eyes that see a ball where a mark of one colour lies whole, and that know what is asked of them."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, pixels: np.ndarray, question: str) -> str:
        self.sizes.append(pixels.shape[:2])
        mark = np.abs(pixels.astype(int) - (200, 0, 200)).sum(-1) < 90
        marked = mark.any() and not (mark[[0, -1]].any() or mark[:, [0, -1]].any())
        if question.startswith("How many"):
            return "There are three balls." if marked else "I do not know."
        if question.startswith("Is there"):
            return "Yes, there is." if marked else "No."
        return 'It says "STOP".'


def test_eyes_find_count_and_read_what_colours_do_not_tell():
    image = np.full((160, 240, 3), 255, np.uint8)
    image[100:110, 200:212] = (200, 0, 200)
    look = Looker()
    seer = EyesSeer(image, look)
    sides = "".join(f"print({side}(a))\n" for side in ("left", "top", "right", "bottom"))
    left, top, right, bottom = map(float, run_program(f'a = find(image, "ball")\n{sides}', seer).output)
    assert left <= 200 < 212 <= right
    assert top <= 100 < 110 <= bottom
    assert right - left < 120
    assert bottom - top < 80
    assert min(max(size) for size in look.sizes) >= 168
    assert run_program('answer(count(image, "ball"))', EyesSeer(image, look)).answer == "3"
    assert run_program("answer(read(crop(image, 0, 0, 20, 1)))", EyesSeer(image, look)).answer == "STOP"
    with pytest.raises(ProgramError, match="tells no number of 'ball'"):
        run_program('count(crop(image, 0, 0, 60, 60), "ball")', EyesSeer(image, look))
    with pytest.raises(ProgramError, match="no 'ball' here"):
        run_program('find(crop(image, 0, 0, 60, 60), "ball")', EyesSeer(image, look))


def test_looks_are_bounded():
    seer = EyesSeer(np.full((40, 40, 3), 255, np.uint8), Looker())
    with pytest.raises(ProgramError, match=f"looked at {MAX_LOOKS} times"):
        run_program("\n".join(["read(image)"] * (MAX_LOOKS + 1)), seer)
