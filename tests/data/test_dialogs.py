"""Dialogs: the same from a seed, split by what they are about, answers that are right, and their speech."""

import re

import pytest

from kimi_mm.data.dialog_sets import prepare_dialogs, read_dialogs
from kimi_mm.data.dialogs import KINDS, is_held_out, make_dialogs
from kimi_mm.data.drills import make_drills
from kimi_mm.data.loader import SpeechShards
from kimi_mm.data.manifest import ManifestError
from kimi_mm.data.numbers import cardinal
from kimi_mm.data.target_loader import TargetShards
from kimi_mm.data.text import Sentence, sentence_id
from kimi_mm.errors import UserError

WORDS = ["brook", "table", "river", "stone", "garden", "window", "silver", "candle", "market", "bridge", "winter"]
WORDS += ["summer", "letter", "paper"]


@pytest.fixture(scope="module")
def sentences():
    texts = [f"The {a} is near the {b}." for a in WORDS for b in WORDS if a != b]
    found = [Sentence(sentence_id(t), t, "wordnet", int(sentence_id(t), 16) % 4 == 0) for t in texts]
    glosses = [f"{word[0].upper()}{word[1:]}: a thing that people know." for word in WORDS]
    return found + [Sentence(sentence_id(t), t, "gloss", False, speech=False) for t in glosses]


def test_a_seed_makes_the_same_dialogs(sentences):
    first = make_dialogs(sentences, 300)
    assert first == make_dialogs(sentences, 300)
    assert first != make_dialogs(sentences, 300, seed=1)
    assert len({dialog.id for dialog in first}) == 300
    assert {len(dialog.turns) for dialog in first} == {1, 2, 3}
    assert {turn.kind for dialog in first for turn in dialog.turns} == {*KINDS, "again"}


def test_what_is_tested_was_never_trained(sentences):
    held = {s.text: s.held_out for s in sentences}
    sets = {held_out: make_dialogs(sentences, 200, held_out=held_out) for held_out in (False, True)}
    keys = {}
    for held_out, dialogs in sets.items():
        turns = [turn for dialog in dialogs for turn in dialog.turns if turn.kind != "again"]
        for turn in turns:
            side = held[turn.key] if turn.kind == "repeat" else is_held_out(turn.kind, turn.key)
            assert side == held_out
        keys[held_out] = {(turn.kind, turn.key) for turn in turns}
    assert not keys[False] & keys[True]


def test_drills_hold_nothing_that_is_tested_and_are_right(sentences):
    drills = make_drills(sentences, 3000, seed=4)
    assert drills == make_drills(sentences, 3000, seed=4)
    assert make_drills(sentences, 0) == []
    number = {cardinal(n): n for n in range(2001)}
    sums = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    spelled, largest = set(), 0
    for [turn] in drills:
        assert not is_held_out(turn.kind, turn.key)
        if turn.kind == "spelling":
            assert turn.answer == ", ".join(turn.key.upper()) + "."
            spelled.add(turn.key)
            continue
        a, sign, b = re.fullmatch(r"(.+) (plus|minus|times) (.+)", turn.key).groups()
        assert turn.answer.endswith(f"is {cardinal(sums[sign](number[a], number[b]))}.")
        largest = max(largest, number[a], number[b])
    known = (*WORDS, "the", "near", "thing", "that", "people", "know")
    assert spelled == {word for word in known if not is_held_out("spelling", word)}
    assert 150 < largest <= 200


def test_answers_are_right(sentences):
    sums = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    number = {cardinal(n): n for n in range(401)}
    told = None
    for dialog in make_dialogs(sentences, 400):
        for turn in dialog.turns:
            if turn.kind == "arithmetic":
                a, sign, b = re.fullmatch(r"(.+) (plus|minus|times) (.+)", turn.key).groups()
                assert turn.expect == f"is {cardinal(sums[sign](number[a], number[b]))}"
                assert turn.answer.endswith(f"{turn.expect}.")
            elif turn.kind == "spelling":
                assert turn.answer.lower().strip(".").replace(", ", "") == turn.key
            elif turn.kind == "counting":
                counted = [number[word] for word in turn.answer.lower().strip(".").split(", ")]
                step = 1 if counted[0] < counted[-1] else -1
                assert counted == list(range(counted[0], counted[-1] + step, step))
                assert turn.key == f"{cardinal(counted[0])} to {cardinal(counted[-1])}"
            elif turn.kind == "memory":
                if turn.judge == "ends":
                    assert turn.key == told
                told = turn.key
            elif turn.kind == "repeat":
                assert turn.question.endswith(turn.answer)
        for before, turn in zip(dialog.turns, dialog.turns[1:], strict=False):
            if turn.kind == "again":
                assert turn.answer == before.answer


def test_too_little_text_is_refused(sentences):
    with pytest.raises(UserError, match="prepare the text"):
        make_dialogs([], 3)
    with pytest.raises(UserError, match="definitions"):
        make_dialogs([s for s in sentences if s.speech], 3)


def test_questions_and_answers_are_spoken(sentences, tmp_path):
    pytest.importorskip("hibari")
    reports = prepare_dialogs(sentences, tmp_path, 1, count=1, voice_weights={"hibari-morph": 1.0})
    assert reports["train"]["dialogs"] == reports["test"]["dialogs"] == 1
    for name in ("train", "test"):
        dialogs = read_dialogs(tmp_path / name)
        assert dialogs == make_dialogs(sentences, 1, held_out=name == "test")
        turns = [turn for dialog in dialogs for turn in dialog.turns]
        asked = {item.text for item in SpeechShards((str(tmp_path / name / "questions"),)).utterances}
        answered = {item.text for item in TargetShards((str(tmp_path / name / "answers"),), ()).utterances}
        assert reports[name]["skipped"] or asked == {turn.question for turn in turns}
        assert reports[name]["skipped"] or answered == {turn.answer for turn in turns}
    again = prepare_dialogs(sentences, tmp_path, 1, count=1, voice_weights={"hibari-morph": 1.0})
    assert again == {name: {**report, "skipped": 0} for name, report in reports.items()}


def test_damaged_dialogs_are_named(tmp_path):
    with pytest.raises(ManifestError, match="prepare dialogs"):
        read_dialogs(tmp_path)
    (tmp_path / "dialogs.jsonl").write_text('{"id": "a", "turns": [{"kind": "x"}]}\n')
    with pytest.raises(ManifestError, match=r"dialogs.jsonl:1: not a dialog"):
        read_dialogs(tmp_path)
