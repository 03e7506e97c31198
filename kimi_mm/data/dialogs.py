"""Spoken dialogs of a bounded domain: what is asked, what is to be answered, and how an answer is judged.

    repeat      "Repeat after me: the door is open."    ─► "The door is open."
    arithmetic  "What is seven plus five?"              ─► "Seven plus five is twelve."
    spelling    "How do you spell table?"               ─► "T, A, B, L, E."
    counting    "Count from three to six."              ─► "Three, four, five, six."
    define      "What does brook mean?"                 ─► "A brook is a natural stream of water." (WordNet's glosses)
    phone       "Connect me to billing."                ─► "Connecting you to billing. Please hold."
    memory      "My name is Anna." "What is my name?"   ─► "Nice to meet you, Anna." "Your name is Anna."
    again       "Say that again."                       ─► the answer before

Every turn has a key, what it is about (the operands, the word, the name); the hash of the key says whether it is held
out. A dialog for training has no held-out turn, one for testing has nothing else, whatever the wording.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kimi_mm.data.numbers import cardinal, digits
from kimi_mm.data.templates import read_slots
from kimi_mm.data.text import WORDS, Sentence, sentence_id
from kimi_mm.errors import UserError

HELD_OUT_MODULUS = 10
# How often a kind is drawn, in any unit. "again" follows other turns only.
KINDS = {"repeat": 5, "arithmetic": 5, "spelling": 4, "counting": 2, "define": 4, "phone": 4, "memory": 3}
SIGNS = ("plus", "plus", "minus", "times")  # each as often as it stands here
TURNS = {1: 0.55, 2: 0.27, 3: 0.18}
DEFINED_WORDS, LEAST_USES = 300, 8

_WORD = re.compile(r"[a-z]{3,8}$")
_GLOSS = re.compile(r"([A-Z][a-z]+): ([a-z][a-z ,']+)\.$")


@dataclass(frozen=True)
class Turn:
    """A question and its answer, both as they are spoken.

    `judge` tells how an answer is right: "exact" (the same words), "near" (at most one word in five differs) or "ends"
    (it ends in `expect`).
    """

    kind: str
    key: str
    question: str
    answer: str
    expect: str
    judge: str = "near"


@dataclass(frozen=True)
class Dialog:
    """Turns in order; `id` is the hash of what is said."""

    id: str
    turns: tuple[Turn, ...]


def is_held_out(kind: str, key: str) -> bool:
    """Whether questions about this key are for testing only."""
    return int(hashlib.sha1(f"{kind}:{key}".encode()).hexdigest()[:12], 16) % HELD_OUT_MODULUS == 0


def word_uses(texts: Iterable[str]) -> Counter[str]:
    """Counts the words of texts, in small letters and without the signs around them."""
    return Counter(word.strip(".,;:?!") for text in texts for word in text.lower().split())


def make_dialogs(sentences: Sequence[Sentence], count: int, *, seed: int = 0, held_out: bool = False) -> list[Dialog]:
    """Draws distinct dialogs.

    Args:
        sentences: prepared text; its short sentences are repeated, its common words spelled and defined.
        count: how many dialogs.
        seed: of every draw; the same seed gives the same dialogs.
        held_out: dialogs for testing instead of training.

    Raises:
        UserError: the text is too little to draw from.
    """
    source = _Source(sentences, held_out)
    rng = random.Random(f"dialogs-{seed}-{held_out}")
    made: dict[str, Dialog] = {}
    for _ in range(20 * count):
        if len(made) >= count:
            break
        length = rng.choices(list(TURNS), list(TURNS.values()))[0]
        turns: list[Turn] = []
        while len(turns) < length:
            if turns and rng.random() < 0.12:
                before = turns[-1]
                question = rng.choice(("Say that again.", "Please repeat that.", "What did you say?"))
                turns.append(Turn("again", before.key, question, before.answer, before.expect, before.judge))
                continue
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            drawn = source.draw(kind, rng)
            if len(turns) + len(drawn) <= max(length, 2):
                turns += drawn
        identity = sentence_id(" | ".join(f"{turn.question} {turn.answer}" for turn in turns))
        made[identity] = Dialog(identity, tuple(turns))
    if len(made) < count:
        raise UserError(f"the text yields only {len(made)} of {count} dialogs; prepare more text, or ask for fewer.")
    return list(made.values())


class _Source:
    """Draws turns of each kind, held out or not."""

    def __init__(self, sentences: Sequence[Sentence], held_out: bool) -> None:
        self.held_out, self.slots = held_out, read_slots()
        self.makers: dict[str, Callable[[random.Random], list[Turn]]] = {
            "repeat": self._repeat,
            "arithmetic": _arithmetic,
            "spelling": self._spelling,
            "counting": _counting,
            "define": self._define,
            "phone": self._phone,
            "memory": self._memory,
        }
        spoken = [s for s in sentences if s.speech and s.source != WORDS]
        self.phrases = [s.text for s in spoken if s.held_out == held_out and 2 <= len(s.text.split()) <= 8]
        uses = word_uses(s.text for s in spoken)
        self.words = sorted(word for word, n in uses.items() if n >= LEAST_USES and _WORD.match(word))
        glosses: dict[str, str] = {}
        for match in (_GLOSS.match(s.text) for s in sentences if not s.speech):
            if match and len(match[2].split()) <= 10:
                glosses.setdefault(match[1].lower(), match[2])  # one meaning a word, always the same
        common = sorted((w for w in glosses if uses[w] >= LEAST_USES and len(w) > 3), key=lambda w: (-uses[w], w))
        self.glosses = {word: glosses[word] for word in common[:DEFINED_WORDS]}
        if not (self.phrases and self.words and self.glosses):
            raise UserError("the text has no short sentences, common words or definitions; prepare the text first.")

    def draw(self, kind: str, rng: random.Random) -> list[Turn]:
        """Returns one turn, or two that belong together, on the right side of the split."""
        for _ in range(10_000):
            turns = self.makers[kind](rng)
            if kind == "repeat" or all(is_held_out(turn.kind, turn.key) == self.held_out for turn in turns):
                return turns
        raise UserError(f"no question of kind '{kind}' is {'' if self.held_out else 'not '}held out.")

    def _repeat(self, rng: random.Random) -> list[Turn]:
        # Sentences carry their own split, which the recogniser was trained by.
        text = rng.choice(self.phrases)
        question = rng.choice(("Repeat after me: {}", "Please say: {}", "Say this after me: {}")).format(text)
        return [Turn("repeat", text, question, text, text)]

    def _spelling(self, rng: random.Random) -> list[Turn]:
        return [spelling_turn(rng.choice(self.words), rng)]

    def _define(self, rng: random.Random) -> list[Turn]:
        # Unseen words could not be answered, so that the wording is what is held out.
        word = rng.choice(list(self.glosses))
        asked = rng.choice(
            ("What does {} mean?", "What is the meaning of {}?", "Define {}.", "Tell me what {} means.", "Explain {}.")
        ).format(word)
        answer = f"{word[0].upper()}{word[1:]} means {self.glosses[word]}."
        return [Turn("define", asked, asked, answer, answer)]

    def _phone(self, rng: random.Random) -> list[Turn]:
        dept, feature = rng.choice(self.slots["dept"]), rng.choice(self.slots["feature"])
        number = digits(f"{int(hashlib.sha1(dept.encode()).hexdigest(), 16) % 900 + 100}")
        state = rng.choice(("on", "off"))
        asked, answer = rng.choice(
            (
                (f"Connect me to {dept}.", f"Connecting you to {dept}. Please hold."),
                (f"I would like to speak with {dept}.", f"Connecting you to {dept}. Please hold."),
                (f"What is the extension of {dept}?", f"The extension of {dept} is {number}."),
                (f"Give me the number of {dept}.", f"The extension of {dept} is {number}."),
                (f"Turn {state} {feature}.", f"{feature[0].upper()}{feature[1:]} is now {state}."),
                (f"Please turn {feature} {state}.", f"{feature[0].upper()}{feature[1:]} is now {state}."),
            )
        )
        return [Turn("phone", asked, asked, answer, answer)]

    def _memory(self, rng: random.Random) -> list[Turn]:
        name, color, number = (
            rng.choice(self.slots["name"]),
            rng.choice(self.slots["color"]),
            cardinal(rng.randint(2, 99)),
        )
        told = (
            (name, "My name is {}.", "Nice to meet you, {}.", "What is my name?", "Your name is {}."),
            (number, "Remember the number {}.", "I will remember {}.", "Which number was it?", "The number was {}."),
            (color, "I like the color {}.", "{} is a nice color.", "Which color do I like?", "You like {}."),
        )
        key, *lines = rng.choice(told)
        tell, reply, ask, answer = (line.format(key) for line in lines)
        reply = reply[0].upper() + reply[1:]
        return [Turn("memory", key, tell, reply, reply), Turn("memory", key, ask, answer, key, "ends")]


def _arithmetic(rng: random.Random) -> list[Turn]:
    sign = rng.choice(SIGNS)
    a, b = (rng.randint(1, 10 if sign == "times" else 20) for _ in range(2))
    return [sum_turn(a, sign, b, rng)]


def sum_turn(a: int, sign: str, b: int, rng: random.Random) -> Turn:
    """Returns a question of arithmetic: a plus or times b, or the larger minus the smaller."""
    if sign == "minus":
        a, b = max(a, b), min(a, b)
    result = cardinal({"plus": a + b, "minus": a - b, "times": a * b}[sign])
    task = f"{cardinal(a)} {sign} {cardinal(b)}"
    asked = rng.choice(("What is {}?", "How much is {}?", "Calculate {}.", "Tell me what {} is."))
    answer = f"{task[0].upper()}{task[1:]} is {result}."
    return Turn("arithmetic", task, asked.format(task), answer, f"is {result}", "ends")


def spelling_turn(word: str, rng: random.Random) -> Turn:
    """Returns a question for the letters of a word."""
    asked = rng.choice(("How do you spell {}?", "Spell the word {}.", "Please spell {}.", "Spell {}."))
    letters = ", ".join(word.upper()) + "."
    return Turn("spelling", word, asked.format(word), letters, letters, "exact")


def _counting(rng: random.Random) -> list[Turn]:
    start, size = rng.randint(1, 20), rng.randint(3, 7)
    numbers = list(range(start, start + size))
    if rng.random() < 0.3:
        numbers.reverse()
    first, last = cardinal(numbers[0]), cardinal(numbers[-1])
    words = ", ".join(map(cardinal, numbers))
    asked = rng.choice(("Count from {} to {}.", "Please count from {} to {}.", "Can you count from {} to {}?"))
    answer = f"{words[0].upper()}{words[1:]}."
    return [Turn("counting", f"{first} to {last}", asked.format(first, last), answer, answer, "exact")]
