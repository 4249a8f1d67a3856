"""The conversation of a node with its model: append-only, so that a server's prefix cache hits on
every turn."""

from __future__ import annotations

from rlm_runtime.lms.base import LM, Message


class History:
    """Messages sent and answered, and what is waiting to be said next.

    User text is collected in `unsent` and becomes one message with the next call; it joins
    `messages` only together with the reply, so a call that failed leaves the history as it was.
    Between two calls `messages` only grows; the one exception is compaction (`replace`), after
    which everything ever said is in `archive`.
    """

    def __init__(self, system: str = ""):
        self.messages: list[Message] = [Message(role="system", content=system)] if system else []
        self.unsent: list[str] = []
        self.archive: list[dict[str, str]] = []
        # the message that opened the current task; survives compaction
        self.first: Message | None = None
        self._opening = False
        self._kept = 0  # how many of `messages` a compaction wrote
        self._tokens = 0  # of `messages`

    @property
    def opening(self) -> bool:
        """Whether what is unsent holds a task."""
        return self._opening

    def open(self, text: str) -> None:
        """Begin a task: its description goes with the next message, which is kept when the history
        is compacted."""
        self._opening = True
        self.unsent.append(text)

    def say(self, text: str) -> None:
        if text:
            self.unsent.append(text)

    def pending(self) -> list[Message]:
        return [Message(role="user", content="\n\n".join(self.unsent))] if self.unsent else []

    def tokens(self, lm: LM) -> int:
        """Size of the next call's prompt; counts only what is new since the last reply."""
        known = self._tokens or lm.count_tokens(self.messages)
        return known + (lm.count_tokens(self.pending()) if self.unsent else 0)

    def answered(self, sent: list[Message], reply: Message, lm: LM, prompt_tokens: int) -> None:
        """`sent` (pending when the call was made) was answered by `reply`. `prompt_tokens` is what
        the endpoint counted for the whole prompt, 0 where it did not."""
        if self._opening and sent:
            self.first, self._opening = sent[-1], False
        before = prompt_tokens or (
            self._tokens or lm.count_tokens(self.messages)
        ) + lm.count_tokens(sent)
        self.messages += [*sent, reply]
        self.unsent = []
        self._tokens = before + lm.count_tokens([reply])

    def replace(self, messages: list[Message]) -> list[dict[str, str]]:
        """Compaction: `messages` instead of all there were. Returns the archive: everything ever
        said, as JSON."""
        self.archive += [
            {"role": m.role, "content": m.content} for m in self.messages[self._kept :]
        ]
        self.messages, self._kept, self._tokens = list(messages), len(messages), 0
        return self.archive
