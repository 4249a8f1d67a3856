"""When a node's history fills its model's window: a summary takes its place, and the REPL keeps the
whole of it."""

from __future__ import annotations

from rlm_runtime import prompts
from rlm_runtime.errors import LMError
from rlm_runtime.lms.base import Message
from rlm_runtime.replies.reader import read
from rlm_runtime.replies.thinking import clean
from rlm_runtime.rlm.conversation import Conversation
from rlm_runtime.trajectory import Compacted

# how often the conversation is halved for a summary that does not fit the window either
SHORTENINGS = 6


def due(node: Conversation) -> bool:
    window = node.tree.options.window_of(node.lm)
    if not window or node.native or not possible(node):  # a native history slides (window.py)
        return False
    return node.history.tokens(node.lm) >= node.tree.options.compact_at * window


def possible(node: Conversation) -> bool:
    """Whether there is anything to compact: more than the task and one exchange after it."""
    return len(node.history.messages) > len(_kept(node)) + 2


def _kept(node: Conversation) -> list[Message]:
    history = node.history
    system = [m for m in history.messages[:1] if m.role == "system"]
    return [*system, history.first] if history.first is not None else system


async def compact(node: Conversation) -> None:
    """Replace the history by system prompt, task and summary; bind all of it as `history` in the
    REPL.

    What is unsent, the newest cell report, stays as it is. Raises LMError, BudgetExceeded,
    SandboxError."""
    history = node.history
    before = history.tokens(node.lm)
    summary = await _summary(node)
    kept = [*_kept(node), Message(role="assistant", content=summary)]
    # the task is still to be told (a session): a summary needs something to follow
    if len(kept) < 3:
        kept.insert(-1, Message(role="user", content=prompts.compacted_before()))
    archive = history.replace(kept)
    await node.environment.bind("history", archive)
    history.unsent.insert(0, prompts.compacted(len(archive)))
    after = history.tokens(node.lm)
    node.tree.emit(
        Compacted(
            node=node.id, turn=node.turn, tokens_before=before, tokens_after=after, summary=summary
        )
    )


async def _summary(node: Conversation) -> str:
    """Ask for it; where even that is too long for the model, without the middle of the
    conversation."""
    messages = list(node.history.messages)
    request = Message(role="user", content=prompts.compaction())
    text, empty = "", False  # an empty summary is asked for once more
    for attempt in range(SHORTENINGS):
        try:
            reply = await node.call(
                [*messages, request], estimate=node.lm.count_tokens([*messages, request])
            )
        except LMError as e:
            kept = len(_kept(node))
            middle = messages[kept:]
            if e.kind != "context_overflow" or not middle or attempt == SHORTENINGS - 1:
                raise
            # whole exchanges
            messages = [*messages[:kept], *middle[max(2, len(middle) // 4 * 2) :]]
            continue
        text = (await read(len(reply.text), clean, reply.text)).text.strip() or reply.text.strip()
        if text or empty:
            break
        empty = True
    return text or "(no summary was given)"  # the whole conversation is still in `history`
