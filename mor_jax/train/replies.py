"""How often a model gives the very reply that a conversation holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from mor_jax.config import DataConfig
from mor_jax.data.chat import ChatError
from mor_jax.data.sources import open_source
from mor_jax.errors import DataError, UserError
from mor_jax.inference.sampler import Sampling
from mor_jax.inference.text import complete
from mor_jax.train.load import Loaded


class GradedReply(NamedTuple):
    """What a model answered. `finish` as of `inference.text.Completion`."""

    id: str  # of the conversation
    expected: str
    text: str
    finish: str

    @property
    def exact(self) -> bool:
        """Whether it is the expected reply, but for white space around it."""
        return self.finish == "stop" and self.text.strip() == self.expected.strip()


class Replies(NamedTuple):
    """All answers, and the ids of conversations that leave no room for one in the model's
    context."""

    answers: tuple[GradedReply, ...]
    too_long: tuple[str, ...]

    def record(self) -> dict[str, float]:
        """replies, exact (a count), exact_share, too_long."""
        n, exact = len(self.answers), sum(a.exact for a in self.answers)
        return {
            "replies": n,
            "exact": exact,
            "exact_share": exact / n if n else 0.0,
            "too_long": len(self.too_long),
        }


def answer(
    loaded: Loaded,
    paths: Sequence[str],
    *,
    messages_key: str = "messages",
    rows: int = 0,
    max_tokens: int = 200,
) -> Replies:
    """Answer the last reply of each conversation anew: greedily, from the messages before it, in
    one batch.

    The prompt is that of the model's chat template, the same that training and the server put
    before a reply.

    Args:
      paths: globs of files with conversations (jsonl, parquet), as in training.
      rows: conversations at most; 0: all.
      max_tokens: of a reply; a longer one is cut, and counts as another.
    Raises:
      DataError: a file cannot be read, or no conversation ends with a message of the assistant.
      UserError: max_tokens below 1.
    """
    if max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, got {max_tokens}.")
    data = DataConfig(source="files", paths=tuple(paths), format="chat", text_key=messages_key)
    template, tokenizer = loaded.template, loaded.tokenizer
    asked: list[tuple[str, str]] = []
    prompts: list[list[int]] = []
    too_long: list[str] = []
    for document in open_source(data).documents():
        if rows and len(asked) + len(too_long) >= rows:
            break
        messages: list[dict[str, Any]] = json.loads(document.text)
        last = next(
            (i for i in reversed(range(len(messages))) if messages[i]["role"] == "assistant"), None
        )
        if last is None:
            continue
        try:
            ids = template.ids(tokenizer, messages[:last])
        except ChatError as e:
            raise DataError(f"{document.id}: {e}") from e
        if len(ids) >= loaded.lm.model.context:
            too_long.append(document.id)
            continue
        asked.append((document.id, messages[last]["content"]))
        prompts.append(ids)
    if not asked and not too_long:
        raise DataError(
            f"{', '.join(paths)}: no conversation has a message of the role 'assistant'."
        )
    done = complete(
        loaded,
        prompts,
        max_tokens=max_tokens,
        sampling=Sampling(0.0),
        stop=template.stops,
        stop_tokens=template.stop_tokens(tokenizer),
    )
    answers = (GradedReply(*known, c.text, c.finish) for known, c in zip(asked, done, strict=True))
    return Replies(tuple(answers), tuple(too_long))


def to_json(reply: GradedReply) -> dict[str, Any]:
    """Its fields, and "exact"."""
    return reply._asdict() | {"exact": reply.exact}
