"""What kind of thing each token is: identifiers, keywords, punctuation of code; words, numbers,
punctuation of prose.

A token belongs to the class of its first character that is not white space, so " self" is an
identifier and ":\\n" is punctuation; one that is all white space is white space. Code is read by
Pygments' lexer for Python, which gives a sensible class to most tokens of other languages too and
never fails on a fragment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String

WHITESPACE = "white space"
CODE = ("identifier", "keyword", "punctuation", "number", "string", "comment", WHITESPACE)
PROSE = ("word", "word, continued", "number", "punctuation", WHITESPACE)
_LEXED = (
    (Operator.Word, "keyword"),
    (Keyword, "keyword"),
    (Name, "identifier"),
    (Number, "number"),
    (String, "string"),
    (Comment, "comment"),
)
_SIGNS = set("(){}[]=_;<>")
_CODE_SHARE = 0.03  # of a text that such signs make up: prose has almost none, code twice as many


@dataclass(frozen=True)
class ClassLine:
    """The tokens of one class: how many, how deep they went, how well what follows them was
    predicted."""

    name: str
    tokens: int
    depth_share: tuple[float, ...]  # of depth 0..R
    nll: float | None  # mean, nats; None where nothing was predicted

    @property
    def mean_depth(self) -> float:
        return sum(d * share for d, share in enumerate(self.depth_share))


def looks_like_code(text: str) -> bool:
    """A guess from the share of brackets and the like among the characters that are not white
    space."""
    solid = [c for c in text if not c.isspace()]
    return bool(solid) and sum(c in _SIGNS for c in solid) / len(solid) > _CODE_SHARE


def classify(tokens: Sequence[str], *, code: bool) -> list[str]:
    """The class of each token, of CODE or PROSE. `tokens`: strings that make the text when
    joined."""
    kinds = _code_kinds("".join(tokens)) if code else []
    found, at = [], 0
    for token in tokens:
        start = at + len(token) - len(token.lstrip())
        at += len(token)
        if not token.strip():
            found.append(WHITESPACE)
        else:
            found.append(kinds[start] if code else _prose_kind(token))
    return found


def by_class(
    tokens: Sequence[str],
    depths: Sequence[int],
    nlls: Sequence[float | None],
    max_depth: int,
    *,
    code: bool,
) -> list[ClassLine]:
    """One line a class that occurs, in the order of CODE or PROSE.

    Args:
      depths: of each token, 0..max_depth.
      nlls: nats, of the prediction made at each token; None where there is none.
    """
    classes = classify(tokens, code=code)
    lines = []
    for name in CODE if code else PROSE:
        mine = [i for i, c in enumerate(classes) if c == name]
        if not mine:
            continue
        share = tuple(sum(depths[i] == d for i in mine) / len(mine) for d in range(max_depth + 1))
        known = [nll for i in mine if (nll := nlls[i]) is not None]
        lines.append(ClassLine(name, len(mine), share, sum(known) / len(known) if known else None))
    return lines


def _code_kinds(text: str) -> list[str]:
    """The class of every character."""
    kinds = ["punctuation"] * len(text)
    # Unprocessed: `get_tokens` would drop and add line ends, and places would no longer be those of
    # the text.
    for at, kind, piece in PythonLexer().get_tokens_unprocessed(text):
        name = next((name for of, name in _LEXED if kind in of), "punctuation")
        kinds[at : at + len(piece)] = [name] * len(piece)
    return kinds


def _prose_kind(token: str) -> str:
    first = token.lstrip()[0]
    if first.isalpha():
        return "word" if token[0].isspace() or first.isupper() else "word, continued"
    return "number" if first.isnumeric() else "punctuation"
