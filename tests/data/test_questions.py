"""Questions and answers: true to the scene, well formed, and right by the judge that scores them."""

import numpy as np
import pytest

from kimi_mm.data.art import Named
from kimi_mm.data.questions import CAPTION, PHRASES, Asker, a, listed
from kimi_mm.data.scene_sets import SETS, draw_set, prepare_scenes, read_set
from kimi_mm.data.scenes import KINDS, Scene, Thing, compose
from kimi_mm.data.where import position_of, relations, side_of
from kimi_mm.errors import UserError
from kimi_mm.evaluation.vision import Judge
from kimi_mm.pipeline import QUESTION


def _scene(*things: Thing, size: int = 300) -> Scene:
    return Scene("several", np.zeros((size, size, 3), np.uint8), "blue", list(things))


DOG, APPLE = Named("dog", "dogs", "animal"), Named("apple", "apples", "fruit")
JEANS, OWL = Named("jeans", "", "clothing"), Named("owl", "owls", "animal")
ASKER = Asker({thing.name: thing for thing in (DOG, APPLE, JEANS, OWL)})


def _asked(scene, kind, tries=60):
    """All wordings of a kind of question about a scene, with their answers."""
    found = [q for n in range(tries) for q in ASKER.questions(scene, np.random.default_rng(n)) if q.kind == kind]
    return {q.text: q.answer for q in found}


def test_words():
    assert [a(name) for name in ("dog", "owl", "umbrella", "unicorn", "hourglass")] == [
        "a dog",
        "an owl",
        "an umbrella",
        "a unicorn",
        "an hourglass",
    ]
    assert listed(["x"]) == "x"
    assert listed(["x", "y", "z"]) == "x, y and z"
    assert CAPTION == QUESTION  # what people get who ask nothing is what was trained most


def test_captions_list_what_is_there_as_one_reads():
    scene = _scene(
        Thing("owl", (200, 0, 260, 60)),
        Thing("dog", (0, 10, 60, 70)),
        Thing("jeans", (0, 200, 60, 260)),
        Thing("dog", (120, 220, 180, 280)),
        Thing("star", (220, 220, 280, 280), "red"),
    )
    captions = _asked(scene, "caption")
    assert captions[CAPTION] == "Two dogs, an owl, jeans and a red star."
    assert captions["Describe the picture."] == "Two dogs, an owl, jeans and a red star on a blue background."
    assert captions["What do you see?"] == "I see two dogs, an owl, jeans and a red star."


def test_wordings_agree_with_what_is_asked_about():
    one = _asked(_scene(Thing("dog", (100, 100, 200, 200))), "name")
    assert one["Which animal is this?"] == "A dog."
    assert one["What is this?"] == "This is a dog."
    trousers = _asked(_scene(Thing("jeans", (100, 100, 200, 200))), "name")
    assert trousers["What is it?"] == "They are jeans."
    counts = _asked(_scene(*(Thing("owl", (i, 0, i + 50, 50)) for i in (0, 100, 200))), "count")
    assert counts["How many owls are there?"] == "Three."
    assert counts["How many owls are in the picture?"] == "There are three."
    presence = _asked(_scene(Thing("jeans", (100, 100, 200, 200))), "presence", 200)
    assert presence["Are there jeans?"] == "Yes, there are."
    assert presence["Is there an owl?"] == "No, there is not."
    colors = _asked(_scene(Thing("star", (0, 0, 90, 90), "red"), Thing("ring", (0, 200, 90, 290), "pink")), "color")
    assert colors["What is the color of the ring?"] == "The ring is pink."


def test_relations_are_asked_only_where_they_are_plain():
    left, right = Thing("dog", (0, 100, 80, 180)), Thing("apple", (200, 110, 280, 190))
    askew, above = Thing("owl", (160, 0, 240, 80)), Thing("jeans", (10, 0, 70, 60))
    assert side_of(left, right) == "left"
    assert side_of(right, left) == "right"
    assert side_of(above, left) == "above"
    assert side_of(left, askew) == ""
    found = {(r.first, r.second): (r.side, r.only) for r in relations(_scene(left, right), np.random.default_rng(0))}
    assert found == {("dog", "apple"): ("left", True), ("apple", "dog"): ("right", True)}
    asked = _asked(_scene(left, right), "relation")
    assert asked["What is to the left of the apple?"] == "The dog."
    assert asked["Where is the dog compared to the apple?"] == "To the left of the apple."
    assert asked["Is the dog to the right of the apple?"] == "No."
    # Two of a kind cannot be told apart by "the".
    assert not relations(_scene(left, Thing("dog", (200, 100, 280, 180))), np.random.default_rng(0))


def test_a_third_thing_can_make_an_answer_ambiguous():
    center = Thing("dog", (0, 120, 60, 180))
    near, far = Thing("apple", (100, 110, 160, 170)), Thing("owl", (120, 150, 180, 210))
    found = {(r.first, r.second): r.only for r in relations(_scene(center, near, far), np.random.default_rng(0))}
    assert found[("apple", "dog")] is False
    apart = Thing("owl", (230, 130, 290, 190))
    found = {(r.first, r.second): r.only for r in relations(_scene(center, near, apart), np.random.default_rng(0))}
    assert found[("apple", "dog")] is True
    assert found[("owl", "dog")] is False


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ((0, 0, 50, 50), "top left"),
        ((120, 120, 180, 180), "middle"),
        ((230, 130, 290, 170), "right"),
        ((130, 240, 170, 300), "bottom"),
        ((90, 90, 110, 110), ""),
    ],
)
def test_positions(box, place):
    assert position_of(Thing("dog", box), _scene(Thing("dog", box))) == place


def test_every_answer_is_right_by_the_judge(art):
    asker, judge, kinds = Asker(art.things), Judge(), set()
    for number in range(240):
        rng = np.random.default_rng((5, number))
        scene = compose(art, list(KINDS)[number % len(KINDS)], (200, 240), rng)
        for question in asker.questions(scene, rng):
            kinds.add(question.kind)
            assert question.text[0].isupper()
            assert question.text[-1] in ".?"
            assert "  " not in question.text + question.answer
            truth = question.truth[0] if question.truth else ""  # nothing is to be seen
            if question.kind in ("read", "line", "spell", "position") or (question.kind == "caption" and scene.text):
                assert truth.lower() in question.answer.lower()
            elif question.kind == "caption":
                assert set(judge.names(question.answer)) == set(judge.names(" , ".join(question.truth))), question
            elif truth in PHRASES:
                assert all(word in question.answer.lower() for word in truth.split())
            else:
                assert judge.right(question, question.answer), question
    assert kinds >= {"caption", "name", "count", "color", "shape", "relation", "position", "presence"}
    assert kinds >= {"read", "line", "digit"}


def test_lines_of_a_page():
    scene = Scene("page", np.zeros((60, 60, 3), np.uint8), "blue", text=("up and", "down", "again"))
    found = [q for n in range(60) for q in ASKER.questions(scene, np.random.default_rng(n))]
    asked = {q.text: q.answer for q in found}
    for which, line in (("first", "up and"), ("second", "down"), ("third", "again"), ("last", "again")):
        assert asked[f"What does the {which} line say?"] == asked[f"Read the {which} line."] == line
    assert asked["How many lines of text are there?"] == "Three."
    assert {q.kind for q in found} == {"line", "count"}


def test_sets_show_what_they_are_about(art_folder):
    judge = Judge()
    for name in SETS[:-1]:
        examples = list(draw_set(name, art_folder, 6))
        assert len(examples) == 6
        again = list(draw_set(name, art_folder, 6))
        for (image, question), (image_2, question_2) in zip(examples, again, strict=True):
            assert question == question_2
            assert image.tobytes() == image_2.tobytes()
            assert min(image.size) >= 56
            assert max(image.size) <= 512
            assert name == "reading" or judge.right(question, question.answer)


def test_art_without_held_out_compositions_is_refused(art_folder, monkeypatch):
    monkeypatch.setattr("kimi_mm.data.scene_sets._unseen", lambda name, scene: False)
    with pytest.raises(UserError, match="too little art"):
        next(draw_set("color", art_folder, 1))


def test_prepared_sets_are_read_back(art_folder, tmp_path, monkeypatch):
    import gzip

    rows = "\n".join(",".join(["8"] * 64 + [str(i % 10)]) for i in range(520))
    folder = tmp_path / "wheel" / "sklearn"
    folder.mkdir(parents=True)
    (folder / "digits.csv.gz").write_bytes(gzip.compress(rows.encode()))
    monkeypatch.setattr("kimi_mm.data.scene_sets.wheel_package", lambda name, packages: tmp_path / "wheel")
    report = prepare_scenes(tmp_path / "scenes", art_folder, count=4)
    assert report == dict.fromkeys(SETS, 4)
    digits = read_set(tmp_path / "scenes" / "digits")
    assert [question.truth[0] for _, question in digits] == ["0", "6", "3", "9"]  # of the twenty that may be used
    assert all(path.is_file() for path, _ in digits)
    with pytest.raises(UserError, match="prepare scenes"):
        read_set(tmp_path / "nowhere")
