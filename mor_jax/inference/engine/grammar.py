"""Output that keeps to a JSON schema, a regular expression or a list of choices: masks by the
llguidance library.

A `Grammars` belongs to a tokenizer and compiles; what it returns is the state of one request
(`request.Grammar`), advanced on the host token by token. JSON comes on one line with at most one
space between its parts, so that a weak model cannot fill its reply with white space.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mor_jax.data.vocabulary import Tokenizer
from mor_jax.errors import UserError
from mor_jax.inference.engine.rows import words

LONGEST = 1 << 18  # characters of a schema or pattern
KEPT = 64  # compiled grammars kept for the next request that asks for the same
ONE_LINE = " ?"  # the pattern of white space


class GrammarBroken(RuntimeError):
    """A request's grammar cannot go on: it was given a token it does not allow, or ran into a limit
    of the library. Only that request is lost."""


class _Spelling:
    """What the library asks of a tokenizer: the bytes of every id. Ids that stand for no text are
    special."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos, tokenizer.bos
        self.tokens = [
            piece or f"<special_{i}>".encode() for i, piece in enumerate(tokenizer.pieces)
        ]
        self.special_token_ids = [i for i, piece in enumerate(tokenizer.pieces) if not piece]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(
            text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        )


class LibraryGrammar:
    """One request's place in a grammar."""

    def __init__(self, matcher: Any, vocab_size: int, eos: int):
        self._matcher, self._vocab_size, self._eos = matcher, vocab_size, eos
        self._ended = False

    def allowed(self) -> np.ndarray:
        """Bit mask uint32 [ceil(V / 32)] of the tokens that may come next; the end of text where it
        may end there."""
        mask = np.zeros(words(self._vocab_size), np.uint32)
        if self.finished:
            mask[self._eos // 32] = np.uint32(1 << self._eos % 32)
            return mask
        found = np.frombuffer(self._matcher.compute_bitmask(), "<u4")
        self._check()
        used = min(len(found), len(mask))
        mask[:used] = found[:used]
        if not mask.any():
            raise GrammarBroken("no token of this tokenizer can go on from here.")
        return mask

    def advance(self, token: int) -> None:
        """The token was drawn."""
        if self._ended:
            raise GrammarBroken(f"token {token} came after the end.")
        if token == self._eos and (self._matcher.is_stopped() or self._matcher.is_accepting()):
            self._ended = True
            return
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        return self._ended or self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarBroken(_first_lines(self._matcher.get_error()))


class Grammars:
    """Compiles for one tokenizer. Any thread; the last `KEPT` grammars are kept compiled.

    Args:
      vocab_size: tokens of the masks; default: the tokenizer's.
    Raises:
      UserError: the library is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None):
        try:
            import llguidance
        except ImportError as e:
            raise UserError(
                "constrained output needs the llguidance package: pip install llguidance (it is in the extra serve)"
            ) from e
        self._library = llguidance.LLMatcher
        self._eos = tokenizer.eos
        self._vocab_size = vocab_size or tokenizer.vocab_size
        wrapped = llguidance.TokenizerWrapper(_Spelling(tokenizer))
        self._tokenizer = llguidance.LLTokenizer(wrapped, n_vocab=tokenizer.vocab_size)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def json_schema(self, schema: Mapping[str, Any] | str) -> LibraryGrammar:
        """JSON that satisfies `schema`.

        Raises:
          UserError: not a JSON schema, or it uses a keyword that cannot be enforced token by token;
            the message names it.
        """
        if not isinstance(schema, str):
            try:
                schema = json.dumps(schema)
            except (TypeError, ValueError, RecursionError) as e:
                raise UserError(f"the JSON schema cannot be written as JSON: {e}.") from e
        _check_text("the JSON schema", schema)
        try:
            if not isinstance(json.loads(schema), dict):
                raise UserError(f"the JSON schema must be an object, got {schema[:60]}.")
            source = self._library.grammar_from_json_schema(
                schema, overrides={"whitespace_pattern": ONE_LINE}
            )
        except (ValueError, RecursionError) as e:
            raise UserError(f"the JSON schema is not valid JSON: {_first_lines(str(e))}.") from e
        return self._start("the JSON schema", source)

    def json_object(self) -> LibraryGrammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> LibraryGrammar:
        """Text that `pattern` matches from end to end. Rust syntax: no look-around, no back
        references.

        Raises:
          UserError: the pattern cannot be compiled; the message says where.
        """
        _check_text("the pattern", pattern)
        return self._start(
            f"the pattern {pattern[:60]!r}", self._library.grammar_from_regex(pattern)
        )

    def choice(self, options: Sequence[str]) -> LibraryGrammar:
        """One of these texts, word for word.

        Raises:
          UserError: none, or an empty one.
        """
        if not options or not all(isinstance(option, str) and option for option in options):
            raise UserError(
                f"a choice needs at least one text, none of them empty, got {list(options)}."
            )
        source = "start: " + " | ".join(
            json.dumps(option, ensure_ascii=False) for option in dict.fromkeys(options)
        )
        _check_text("the choice", source)
        return self._start("the choice", self._library.grammar_from_lark(source))

    def _start(self, name: str, source: str) -> LibraryGrammar:
        with self._lock:
            matcher = self._compiled.get(source)
        if matcher is None:
            matcher = self._library(self._tokenizer, source, log_level=0)
            if not matcher.is_error():
                # a hard pattern does most of its work here, which all copies share
                matcher.compute_bitmask()
            if matcher.is_error():
                raise UserError(f"{name} cannot be compiled: {_first_lines(matcher.get_error())}")
        with self._lock:
            self._compiled[source] = matcher
            self._compiled.move_to_end(source)
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return LibraryGrammar(matcher.deep_copy(), self._vocab_size, self._eos)


def _check_text(name: str, text: str) -> None:
    if len(text) > LONGEST:
        raise UserError(f"{name} has {len(text)} characters; at most {LONGEST} are compiled.")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"{name} cannot be encoded as UTF-8: {e.reason} at character {e.start}."
        ) from e


def _first_lines(message: str, lines: int = 4) -> str:
    """The library's message without its dump of the parser."""
    return "\n".join(message.strip().splitlines()[:lines])


__all__ = ["GrammarBroken", "Grammars", "LibraryGrammar"]
