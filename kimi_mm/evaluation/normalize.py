"""The normaliser of every word error rate in this project. Publish `NORMALIZER_VERSION` with each figure.

Applied to reference and hypothesis alike, in this order:

1. Unicode NFKC, curly quotes made straight, text in [] or <> dropped, lower case;
2. "#" is "pound", "*" is "star", "&" "and", "%" "percent", "@" "at";
3. "a.m." and "p.m." (also "a m", "p m") are "am" and "pm"; dots inside initialisms are dropped;
4. numbers become words as `kimi_mm.data.numbers` reads them; "seven o'clock" and "seven" differ;
5. unambiguous contractions are written out ("i'm": "i am", "won't": "will not", "let's": "let us", "it's": "it is");
   apostrophes of possessives are dropped ("party's": "partys");
6. hyphens and all other punctuation become spaces;
7. spellings of one spoken form are joined: "ok" and "okay", "voice mail" and "voicemail", and the pairs of `SAME`.

Filler words and British spellings are left alone.
"""

from __future__ import annotations

import re
import unicodedata

from kimi_mm.data.numbers import spell_digits

NORMALIZER_VERSION = "kimi-mm-en-1"

SAME = {
    "ok": "okay",
    "o k": "okay",
    "voice mail": "voicemail",
    "voice mails": "voicemails",
    "mail box": "mailbox",
    "mail boxes": "mailboxes",
    "e mail": "email",
    "e mails": "emails",
    "key pad": "keypad",
    "touch tone": "touchtone",
    "play back": "playback",
    "re enter": "reenter",
    "re entered": "reentered",
    "re record": "rerecord",
    "un mute": "unmute",
    "un muted": "unmuted",
    "de activated": "deactivated",
    "de activate": "deactivate",
    "black list": "blacklist",
    "black listed": "blacklisted",
    "web site": "website",
    "tele marketers": "telemarketers",
    "for ever": "forever",
    "forever more": "forevermore",
    "thru": "through",
    "alright": "all right",
    "mister": "mr",
    "missus": "mrs",
    "doctor": "dr",
    "a m": "am",
    "p m": "pm",
    "cannot": "can not",
    "goodbye": "good bye",
}

_SYMBOLS = str.maketrans(
    {"#": " pound ", "*": " star ", "&": " and ", "%": " percent ", "@": " at ", "’": "'", "‘": "'", "`": "'"}
)
_WORD_CONTRACTIONS = {
    "won't": "will not",
    "can't": "can not",
    "shan't": "shall not",
    "ain't": "is not",
    "let's": "let us",
    "y'all": "you all",
    "'tis": "it is",
    "gonna": "going to",
    "wanna": "want to",
    "gotta": "got to",
}
_IS = re.compile(r"\b(it|that|there|here|what|where|who|how|he|she|when|why)'s\b")
_ENDINGS = (
    (re.compile(r"(?<=\w)n't\b"), " not"),
    (re.compile(r"(?<=\w)'m\b"), " am"),
    (re.compile(r"(?<=\w)'re\b"), " are"),
    (re.compile(r"(?<=\w)'ll\b"), " will"),
    (re.compile(r"(?<=\w)'ve\b"), " have"),
)
_WHOLE = re.compile(
    r"(?<![\w'])(" + "|".join(re.escape(word) for word in sorted(_WORD_CONTRACTIONS, key=len, reverse=True)) + r")\b"
)
_SAME = re.compile(r"\b(" + "|".join(sorted(SAME, key=len, reverse=True)) + r")\b")
_INITIALISM = re.compile(r"\b(?:[a-z]\.){2,}")


def normalize_english(text: str) -> str:
    """Returns the text as lower-case words with single spaces, by the rules of this module.

    Args:
        text: a transcript in English, any case and punctuation.
    """
    text = unicodedata.normalize("NFKC", text).translate(_SYMBOLS).lower()
    text = re.sub(r"\[[^\]]*\]|<[^>]*>", " ", text)
    text = _INITIALISM.sub(lambda m: m[0].replace(".", "") + " ", text)
    text = re.sub(r"(?<=[a-z])(?=\d)", " ", text)
    text = re.sub(r"(?<=\d)(?!(?:st|nd|rd|th)\b)(?=[a-z])", " ", text)
    text = spell_digits(text)
    text = _WHOLE.sub(lambda m: _WORD_CONTRACTIONS[m[1]], text)
    text = _IS.sub(r"\1 is", text)
    for pattern, words in _ENDINGS:
        text = pattern.sub(words, text)
    text = re.sub(r"(?<=\w)'(?=\w)", "", text)
    text = "".join(c if c.isalnum() else " " for c in text)
    return _SAME.sub(lambda m: SAME[m[1]], " ".join(text.split()))
