"""Replies that are no answer, and endpoints that read less than they were sent."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from rlm_runtime.errors import LMError
from rlm_runtime.lms import tokens
from rlm_runtime.lms.base import LM, Message, Reply, Sampling, Usage

EMPTY_RETRIES = 2  # of a call whose reply was empty, or cut before its first word
GROWTH = 4  # how much more a call may generate after it was cut before its first word
CHECKED_CHARS = 6_000  # shorter prompts fit every window
SMALLEST_WINDOW = 256  # tokens; a smaller count of a long prompt is no count
COUNTED_CHARS = 1 << 20  # of a text whose words are counted; the rest is taken to be alike


def no_answer(lm: LM, reply: Reply, text: str) -> LMError | None:
    """Why `text`, the reply without what the model thought, is no answer; None: it is one."""
    began = f" It began: {text.strip()[:200]}" if text.strip() else ""
    if reply.finish_reason == "content_filter":
        message, kind = (
            f"the reply was refused or held back by a content filter.{began}",
            "content_filter",
        )
    elif text.strip() or reply.tool_calls:
        return None
    elif reply.finish_reason == "length":
        message = (
            f"the reply was cut before its first word, after {reply.usage.output_tokens:,} tokens of thinking. "
            "Raise max_tokens, lower reasoning_effort, or ask for less at once."
        )
        kind = "truncated"
    else:
        message, kind = "the reply was empty.", "empty"
    return LMError(f"{lm.name}: {message}", kind=kind, model=lm.name)


def another_try(error: LMError, sampling: Sampling, tries: int) -> Sampling | None:
    """The sampling to ask again with after `tries` such replies; None: asking again does not
    help."""
    if tries > EMPTY_RETRIES or error.kind == "content_filter":
        return None
    if error.kind == "empty":
        return sampling
    if sampling.max_tokens is None or tries > 1:
        return None  # the endpoint's own limit: asked again it would be the same
    return sampling.model_copy(update={"max_tokens": GROWTH * sampling.max_tokens})


class Windows:
    """What endpoints turned out to read of a prompt, where that is less than was sent.

    Some servers cut a prompt that is longer than their window and answer what is left. It shows in
    their count of the prompt's tokens: no tokenizer needs fewer tokens than a text has words.
    """

    def __init__(self) -> None:
        # the largest prompt an endpoint ever counted
        self._most: WeakKeyDictionary[LM, int] = WeakKeyDictionary()
        self._cut: WeakKeyDictionary[LM, int] = WeakKeyDictionary()

    def of(self, lm: LM) -> int | None:
        """Tokens this model's endpoint reads; None: nothing was ever cut."""
        try:
            return self._cut.get(lm)
        except TypeError:  # a model that cannot be hashed
            return None

    def watch(self, lm: LM, messages: Sequence[Message], usage: Usage) -> bool:
        """Note what the endpoint counted; True where a prompt was cut, the first time only."""
        counted = usage.input_tokens
        if usage.estimated or counted < SMALLEST_WINDOW:
            return False
        try:
            most = self._most[lm] = max(counted, self._most.get(lm, 0))
        except TypeError:  # neither hashed nor held weakly
            return False
        if lm in self._cut:
            self._cut[lm] = most  # never less than it was seen to read
            return False
        chars = sum(len(m.content) for m in messages)
        if chars < CHECKED_CHARS or counted * 6 > chars:
            return False
        # Servers that leave out what they had in their cache have counted as much before, or count
        # the newest messages.
        if most >= least_tokens(messages) // 2 or counted <= _most_of_newest(messages):
            return False
        self._cut[lm] = most
        return True


WINDOWS = Windows()  # of this process: what one run learns of a model, the next one knows


def _most_of_newest(messages: Sequence[Message]) -> int:
    """Tokens, from above, of what was said after the last reply; 0 for a prompt without replies."""
    said = [i for i, m in enumerate(messages) if m.role == "assistant"]
    return tokens.count(messages[said[-1] + 1 :]) + SMALLEST_WINDOW if said else 0


def least_tokens(messages: Sequence[Message]) -> int:
    """Tokens of a prompt, from below: one for each word, and for scripts without spaces one for ten
    UTF-8 bytes."""
    total = 0.0
    for message in messages:
        text = message.content[:COUNTED_CHARS]
        beyond_ascii = 0 if text.isascii() else len(text.encode("utf-8", "replace")) - len(text)
        count = max(len(text.split()), beyond_ascii // 5)
        total += count * len(message.content) / max(1, len(text))
    return int(total)
