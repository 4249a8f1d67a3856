"""Calls of a run as conversations to train on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlm_runtime.lms.base import Message


@dataclass(frozen=True)
class Conversation:
    """`messages` as `data.format = chat` reads them; `provenance` says what it was made of."""

    messages: tuple[Mapping[str, Any], ...]
    provenance: Mapping[str, Any]

    def line(self) -> str:
        record = {"messages": list(self.messages), "provenance": dict(self.provenance)}
        return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"

    @property
    def chars(self) -> int:
        return sum(len(m["content"]) for m in self.messages)


def spoken(role: str, content: str, weight: float | None = None) -> dict[str, Any]:
    """A message; a weight only where it is not the one of its role."""
    return {"role": role, "content": content} | ({} if weight is None else {"weight": weight})


def conversations(
    calls: Iterable[tuple[Sequence[Message], str]],
    weight: Callable[[str], float],
    provenance: Mapping[str, Any],
) -> list[Conversation]:
    """One conversation for as many calls as continue each other; where the history slid, a new one
    begins.

    In it every reply has a loss once: those repeated from an earlier conversation have weight 0, as
    have those that `weight` gives 0. A conversation without any is left out.
    """
    # messages, and the replies among them that are new
    open_: list[tuple[list[Message], list[str]]] = []
    for messages, reply in calls:
        sent = list(messages)
        said = Message(role="assistant", content=reply)
        for known, new in open_:
            if known == sent[: len(known)] and len(sent) > len(known):
                known[:] = [*sent, said]
                new.append(reply)
                break
        else:
            open_.append(([*sent, said], [reply]))
    found = []
    for messages, new in open_:
        fresh = list(new)
        turns: list[dict[str, Any]] = []
        for message in reversed(messages):  # the new replies are the last ones
            if message.role != "assistant":
                turns.append(spoken(message.role, message.content))
            elif fresh and message.content == fresh[-1]:
                own = weight(fresh.pop())
                turns.append(spoken("assistant", message.content, None if own == 1.0 else own))
            else:
                turns.append(spoken("assistant", message.content, 0.0))
        turns.reverse()
        if any(t["role"] == "assistant" and t.get("weight", 1.0) for t in turns):
            role = "root" if messages[0].role == "system" else "sub"
            found.append(
                Conversation(tuple(turns), {**provenance, "role": role, "replies": len(new)})
            )
    return found
