"""Published vocabularies in tiktoken's form: `tiktoken.model`, one `base64 rank` a line, and named special ids.

    text ──pattern──► pre-tokens ──BPE by rank──► ids 0 .. R - 1          specials: R and above, never made from text

Patterns: "k2" is that of Kimi K2, K2.5 and Kimi-Linear (runs of Han characters apart, numbers by three digits),
"qwen" that of Qwen and Kimi-Audio (numbers digit by digit).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from kimi_mm.errors import CheckpointError, UserError
from kimi_mm.text.tokenizer import TextTokenizer

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "k2": "|".join(
        (
            r"[\p{Han}]+",
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?",
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?",
            r"\p{N}{1,3}",
            _REST,
        )
    ),
    "qwen": "|".join((_ENDINGS, r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}", _REST)),
}
LONGEST_RUN = 25_000  # characters without a change between space and text; the library is quadratic in it
_RUNS = re.compile(rf"\s{{1,{LONGEST_RUN}}}|\S{{1,{LONGEST_RUN}}}")


class TiktokenTokenizer(TextTokenizer):
    """Encodes and decodes text with a published vocabulary.

    Args:
        ranks: bytes of every token, by rank; all numbers from 0 on.
        pattern: one of `PATTERNS`.
        visible: specials that `decode` shows, such as <think>.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str, visible: dict[int, str] | None = None) -> None:
        try:
            import tiktoken
        except ModuleNotFoundError:
            raise UserError(
                "this model's vocabulary needs the package 'tiktoken': pip install 'kimi-mm[published]'."
            ) from None
        self._encoding = tiktoken.Encoding(
            "kimi", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=len(ranks)
        )
        self._size, self._visible = len(ranks), visible or {}

    @classmethod
    def from_folder(cls, folder: Path, pattern: str) -> TiktokenTokenizer:
        """Reads `tiktoken.model`, and from `tokenizer_config.json`, if it is there, which specials are visible.

        Raises:
            CheckpointError: names the file that is missing or damaged, and the line.
        """
        visible: dict[int, str] = {}
        config = folder / "tokenizer_config.json"
        if config.is_file():
            try:
                added = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
                visible = {int(i): token["content"] for i, token in added.items() if not token.get("special", True)}
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{config}: not a tokenizer config ({error}).") from None
        return cls(read_ranks(folder / "tiktoken.model"), pattern, visible)

    def __len__(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        """Returns the BPE ids of a text; markers of special tokens inside it stay plain characters."""
        return [token for piece in _pieces(text) for token in self._encoding.encode_ordinary(piece)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of many texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; specials are skipped but for the visible ones."""
        out, run = [], []
        for token in ids:
            if 0 <= token < self._size:
                run.append(token)
            elif token in self._visible:
                out += [self._encoding.decode(run), self._visible[token]]
                run = []
        return "".join([*out, self._encoding.decode(run)])

    def to_json(self) -> str:
        """A tiktoken vocabulary has no JSON form; it stays in `tiktoken.model`."""
        raise UserError("a tiktoken vocabulary is kept in tiktoken.model; copy that file along.")


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads `tiktoken.model`.

    Raises:
        CheckpointError: the file is missing, or a line is not `base64 rank`; names both.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not a tiktoken vocabulary.") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise CheckpointError(f"{path}: line {number} is not 'base64 rank'.") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise CheckpointError(f"{path}: ranks do not count from 0 on without a gap; the file is cut or damaged.")
    return ranks


def _pieces(text: str) -> Iterator[str]:
    """Cuts a text where a run of one kind gets too long, nowhere else."""
    if len(text) <= LONGEST_RUN:
        yield text
        return
    start = 0
    for match in _RUNS.finditer(text):
        following = text[match.end() : match.end() + 1]
        if match.end() - match.start() == LONGEST_RUN and following and following.isspace() == match[0][0].isspace():
            yield text[start : match.end()]
            start = match.end()
    if start < len(text):
        yield text[start:]
