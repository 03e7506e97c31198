"""A small language of operations on pictures: text to a tree, and nothing else.

    program    = line { newline line }            line = [ NAME "=" ] sum [ "#" comment ]
    sum        = product { ("+" | "-") product }  product = value { ("*" | "/") value }
    value      = NUMBER | STRING | NAME | NAME "(" [ sum { "," sum } ] ")" | "(" sum ")" | "-" value

There are no loops, no attributes and no definitions, so that a program's length bounds its work. Nothing is ever passed
to Python's own `eval` or `exec`; `interpreter` walks the tree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kimi_mm.errors import UserError

MAX_CHARACTERS = 4000
MAX_LINES = 64
MAX_TOKENS = 200  # of a line, which also bounds how deep its tree can be
MAX_DEPTH = 16
MAX_NUMBER = 1e9
_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?)|([A-Za-z_]\w*)|\"([^\"\n]*)\"|'([^'\n]*)'|([-+*/(),=]))", re.ASCII)


class ProgramError(UserError):
    """A program that cannot be read or run; names the line and what to do."""


@dataclass(frozen=True)
class Number:
    """A literal number."""

    value: float


@dataclass(frozen=True)
class String:
    """A literal text."""

    value: str


@dataclass(frozen=True)
class Name:
    """A variable."""

    name: str


@dataclass(frozen=True)
class Call:
    """An operation on arguments; "+", "-", "*" and "/" are operations too."""

    name: str
    arguments: tuple[Node, ...]


Node = Number | String | Name | Call


@dataclass(frozen=True)
class Line:
    """One line: `target` is the variable that gets the value, "" for none."""

    number: int
    target: str
    value: Node


def parse(source: str) -> list[Line]:
    """Reads a program.

    Args:
        source: its text.

    Returns:
        Its lines, without empty ones and comments.

    Raises:
        ProgramError: when it is too long, too deep or not of the language.
    """
    if len(source) > MAX_CHARACTERS:
        raise ProgramError(f"the program has {len(source)} characters; at most {MAX_CHARACTERS} are allowed.")
    lines = []
    for number, text in enumerate(source.splitlines(), start=1):
        tokens = _tokens(text, number)
        if len(tokens) > MAX_TOKENS:
            raise ProgramError(f"line {number}: a line has at most {MAX_TOKENS} words and signs.")
        if tokens:
            lines.append(_Parser(tokens, number).line())
        if len(lines) > MAX_LINES:
            raise ProgramError(f"line {number}: a program has at most {MAX_LINES} lines.")
    if not lines:
        raise ProgramError("the program is empty.")
    return lines


def _tokens(text: str, number: int) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        rest = text[at:].lstrip()
        if not rest or rest.startswith("#"):
            break
        match = _TOKEN.match(text, at)
        if match is None:
            raise ProgramError(f"line {number}: '{rest[:12]}' is not part of the language.")
        digits, name, double, single, sign = match.groups()
        if digits is not None:
            found.append(("number", digits))
        elif name is not None:
            found.append(("name", name))
        elif sign is not None:
            found.append((sign, sign))
        else:
            found.append(("string", double if double is not None else single))
        at = match.end()
    return found


class _Parser:
    """Recursive descent over the tokens of one line."""

    def __init__(self, tokens: list[tuple[str, str]], number: int) -> None:
        self.tokens, self.number, self.at = tokens, number, 0

    def line(self) -> Line:
        target = ""
        if len(self.tokens) > 1 and self.tokens[0][0] == "name" and self.tokens[1][0] == "=":
            target, self.at = self.tokens[0][1], 2
        value = self.sum(0)
        if self.at < len(self.tokens):
            raise self.error(f"'{self.tokens[self.at][1]}' was not expected")
        return Line(self.number, target, value)

    def sum(self, depth: int) -> Node:
        value = self.product(depth)
        while self.peek() in ("+", "-"):
            value = Call(self.take(), (value, self.product(depth)))
        return value

    def product(self, depth: int) -> Node:
        value = self.value(depth)
        while self.peek() in ("*", "/"):
            value = Call(self.take(), (value, self.value(depth)))
        return value

    def value(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self.error(f"nested more than {MAX_DEPTH} deep")
        kind = self.peek()
        if kind == "":
            raise self.error("the line ends too early")
        text = self.take()
        if kind == "number":
            if float(text) > MAX_NUMBER:
                raise self.error(f"a number beyond {MAX_NUMBER:.0e}")
            return Number(float(text))
        if kind == "string":
            return String(text)
        if kind == "-":
            return Call("-", (Number(0.0), self.value(depth + 1)))
        if kind == "(":
            inner = self.sum(depth + 1)
            self.expect(")")
            return inner
        if kind != "name":
            raise self.error(f"'{text}' was not expected")
        if self.peek() != "(":
            return Name(text)
        self.take()
        arguments: list[Node] = []
        while self.peek() != ")":
            if arguments:
                self.expect(",")
            arguments.append(self.sum(depth + 1))
        self.take()
        return Call(text, tuple(arguments))

    def peek(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1][1]

    def expect(self, sign: str) -> None:
        if self.peek() != sign:
            raise self.error(f"'{sign}' is missing")
        self.take()

    def error(self, reason: str) -> ProgramError:
        return ProgramError(f"line {self.number}: {reason}.")
