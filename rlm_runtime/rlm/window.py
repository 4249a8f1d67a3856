"""What of a conversation is sent where the model's window cannot hold all of it, by the model's own
`count_tokens`.

A report that is too long is cut in its middle, for every model. The history of a model that is
spoken to in the native words slides besides: system prompt and task stay, the oldest exchanges are
left out. (Other models get a summary, `compaction.py`.)
"""

from __future__ import annotations

from typing import NamedTuple

from rlm_runtime.errors import LMError
from rlm_runtime.lms.base import LM, Message
from rlm_runtime.rlm.conversation import Conversation

NEAR = 0.8  # of the room: below it the running count, which is a sum over parts, is good enough
LEAST = 24  # characters of a report that is cut


class Fitted(NamedTuple):
    messages: list[Message]
    left_out: int  # the oldest messages, system prompt and task aside, that are not sent


def reply_room(node: Conversation, window: int) -> int:
    """Tokens of the window that are kept for the reply."""
    wanted = node.tree.options.root_sampling.max_tokens or 512
    return min(wanted, window // 4 if node.native else window // 16)


def fit(node: Conversation) -> Fitted:
    """The messages of the next call. Cuts the unsent report in the history where it has to.

    Raises LMError (context_overflow) where even system prompt and task do not fit a native model's
    window."""
    history, lm = node.history, node.lm
    sent, pending = history.messages, history.pending()
    everything = Fitted([*sent, *pending], 0)
    window = node.tree.options.window_of(lm)
    if not window:
        return everything
    most = window - reply_room(node, window)
    # the running count is of what was sent, not of all
    near = node.native or history.tokens(lm) >= NEAR * most
    if not near or lm.count_tokens(everything.messages) <= most:
        return everything
    system = [m for m in sent[:1] if m.role == "system"]
    if history.opening:
        head, tail = system, sent[len(system) :]
        size = lm.count_tokens([*head, *pending])
        if size > most and node.native:
            raise LMError(
                f"{lm.name}: its window of {window:,} tokens is too small: system prompt and question take {size:,}, and "
                f"{window - most:,} are kept for the reply. Ask a shorter question, or use a model with a larger window.",
                kind="context_overflow",
                model=lm.name,
            )
    else:
        first = sent.index(history.first) if history.first is not None else len(system) - 1
        head, tail = [*system, *sent[max(first, len(system)) : first + 1]], sent[first + 1 :]
    if not node.native:
        head, tail = sent, []
    left_out = 0
    if node.native:
        least = 0 if history.opening else 1
        while (
            len(tail) - left_out > least
            and lm.count_tokens([*head, *tail[left_out:], *pending]) > most
        ):
            left_out += 2  # a reply and the message after it
    kept = [*head, *tail[left_out:]]
    if pending and not history.opening and lm.count_tokens([*kept, *pending]) > most:
        history.unsent = [_cut(pending[0].content, kept, lm, most)]
        pending = history.pending()
        # a reply of odd length
        if node.native and left_out < len(tail) and lm.count_tokens([*kept, *pending]) > most:
            kept = head
    return Fitted([*kept, *pending], len(sent) - len(kept))


def _cut(text: str, kept: list[Message], lm: LM, most: int) -> str:
    """The longest beginning and end of `text` that fit; LEAST characters where nothing does."""

    def shortened(chars: int) -> str:
        head, tail = (chars + 1) // 2, chars // 2
        return f"{text[:head]}\n[{len(text) - chars:,} characters cut]\n{text[len(text) - tail :]}"

    low, high = LEAST, max(LEAST, len(text) - 1)
    while low < high:
        middle = (low + high + 1) // 2
        if lm.count_tokens([*kept, Message(role="user", content=shortened(middle))]) <= most:
            low = middle
        else:
            high = middle - 1
    return shortened(low)
