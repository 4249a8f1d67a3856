"""Classes of tokens: what a token is does not depend on how the text was cut, only on where it
begins."""

import inspect
import json.decoder

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor_jax.analysis.token_classes import (
    CODE,
    PROSE,
    WHITESPACE,
    by_class,
    classify,
    looks_like_code,
)

SOURCE = inspect.getsource(json.decoder)
PROSE_TEXT = (
    "Fellow citizens, in 1834 the Treasury held 12 million dollars; what follows is the account of it. "
    * 20
)


def test_code():
    tokens = [
        "def",
        " f",
        "(",
        "x",
        "):",
        "\n    ",
        "return",
        " x",
        " not",
        " in",
        " 12",
        "  # why",
        " it",
        "\n",
        "'a'",
    ]
    assert classify(tokens, code=True) == [
        "keyword",
        "identifier",
        "punctuation",
        "identifier",
        "punctuation",
        WHITESPACE,
        "keyword",
        "identifier",
        "keyword",
        "keyword",
        "number",
        "comment",
        "comment",
        WHITESPACE,
        "string",
    ]


def test_prose():
    tokens = ["The", " house", "s", " of", " 12", "3", ",", "\n\n", " é", "(", "Law"]
    assert classify(tokens, code=False) == [
        "word",
        "word",
        "word, continued",
        "word",
        "number",
        "number",
        "punctuation",
        WHITESPACE,
        "word",
        "punctuation",
        "word",
    ]


@given(st.lists(st.integers(1, 9), min_size=40, max_size=60))
def test_any_cut_of_a_source_gives_the_classes_of_its_characters(sizes):
    text, tokens, at = SOURCE[2000:2200], [], 0
    for size in sizes:
        tokens.append(text[at : at + size])
        at += size
    tokens = [t for t in [*tokens, text[at:]] if t]
    whole = classify(list(text), code=True)  # one character a token
    place = 0
    for token, name in zip(tokens, classify(tokens, code=True), strict=True):
        first = len(token) - len(token.lstrip())
        assert name == (whole[place + first] if token.strip() else WHITESPACE)
        place += len(token)


@given(st.lists(st.text(max_size=4), max_size=30), st.booleans())
def test_any_text_is_classified_and_every_token_counted(tokens, code):
    names = classify(tokens, code=code)
    assert set(names) <= set(CODE if code else PROSE)
    depths = [i % 4 for i in range(len(tokens))]
    lines = by_class(tokens, depths, [None] * len(tokens), 3, code=code)
    assert sum(line.tokens for line in lines) == len(tokens)
    assert sum(line.tokens * line.mean_depth for line in lines) == pytest.approx(sum(depths))


def test_means_are_of_the_class():
    tokens, depths, nlls = ["a", " b", ",", " 1"], [1, 3, 2, 0], [1.0, None, 4.0, 0.5]
    lines = {line.name: line for line in by_class(tokens, depths, nlls, 3, code=False)}
    # nothing was predicted there
    assert lines["word, continued"].nll == 1.0 and lines["word"].nll is None
    assert lines["word"].depth_share == (0, 0, 0, 1) and lines["punctuation"].mean_depth == 2


def test_code_and_prose_are_told_apart():
    assert (
        looks_like_code(SOURCE) and not looks_like_code(PROSE_TEXT) and not looks_like_code(" \n")
    )
