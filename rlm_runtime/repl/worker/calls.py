"""What a cell can ask of the host: sub-LM calls, child runs, tools. From any thread of the cell,
many at a time."""

from __future__ import annotations

from _thread import allocate_lock, get_ident
from sys import _current_frames

from . import interrupts, jsonable
from .channel import Channel, TooLarge

# whose functions wait for others
WAITING = ("worker", "threading", "queue", "selectors", "concurrent", "asyncio")
_main = get_ident()
TYPES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
}


class CallError(Exception):
    """A call that failed. `kind`: budget, auth, timeout, rate_limit, refused, tool, ...; `message`
    says what happened.

    A single call raises it; in a batch it stands in the place of the answer.
    """

    def __init__(self, message: str, kind: str = "error"):
        super().__init__(message)
        self.message, self.kind = message, kind

    def __str__(self) -> str:
        return f"{self.message} [{self.kind}]"

    def __repr__(self) -> str:
        return f"CallError({self.message!r}, kind={self.kind!r})"


class _Waiter:
    __slots__ = ("done", "outcomes")

    def __init__(self):
        self.done, self.outcomes = allocate_lock(), None
        self.done.acquire()


class Calls:
    """Requests of the running cell and those who wait for them."""

    def __init__(self, channel: Channel):
        self._channel, self._cell, self._last = channel, "", 0
        self._waiting: dict[int, _Waiter] = {}
        self._order = allocate_lock()

    def begin(self, cell: str) -> None:
        """A new cell: whoever still waits, in a thread of an earlier one, is told that its cell is
        over."""
        self._order = allocate_lock()  # the old one may be held by a thread that died with it
        with self._order:
            stale, self._waiting = self._waiting, {}
            # numbers go on: a thread of an earlier cell never holds one of this cell's
            self._cell = cell
        for waiter in stale.values():
            waiter.outcomes = [{"e": "the cell that made this call has ended", "k": "refused"}]
            waiter.done.release()

    def end(self) -> None:
        self._cell = ""

    def _post(self, cell: str, data: bytes, waiter: _Waiter) -> int:
        """Number the request and send it; numbers arrive in order, which is how the host knows a
        replay."""
        with self._order:
            if cell != self._cell:  # it ended meanwhile: nobody would answer
                raise CallError("the cell that made this call has ended", "refused")
            self._last += 1
            number = self._last
            self._waiting[number] = waiter
            self._channel.write(b'{"id":%d,%s' % (number, data[1:]))
        return number

    def reply(self, message: dict) -> None:
        """In the reading thread."""
        waiter = self._waiting.pop(message["id"], None)
        if waiter is not None and message["cell"] == self._cell:
            waiter.outcomes = message["outcomes"]
            waiter.done.release()

    def main_waits(self) -> bool:
        """Whether the main thread waits: for a call itself, or for a thread or a task, which may
        wait for one."""
        frame = _current_frames().get(_main)
        if frame is None:
            return False
        name = frame.f_globals.get("__name__")
        return type(name) is str and name.split(".")[0] in WAITING

    def ask(self, what: str, count: int, **fields) -> list:
        """As many outcomes as `count`: values and CallErrors."""
        cell = self._cell
        if not cell:
            raise CallError("no cell is running", "refused")
        try:
            data = self._channel.encode({"t": "request", "cell": cell, **fields})
        except TooLarge as error:
            raise ValueError(f"{what}: {error}; send less at a time.") from None
        waiter = _Waiter()
        number = self._post(cell, data, waiter)
        try:
            interrupts.deliver()
            waiter.done.acquire()
        finally:
            self._waiting.pop(number, None)
        outcomes = [
            CallError(o["e"], o.get("k") or "error") if "e" in o else o.get("v")
            for o in waiter.outcomes
        ]
        if len(outcomes) != count:  # the host refused the request as a whole
            first = outcomes[0] if outcomes else CallError("the call came back without an answer")
            outcomes = [first] * count
        return outcomes


interrupts.shield(Calls._post)


def helpers(calls: Calls) -> dict:
    """The functions a cell finds under their names."""

    def one(what, **fields):
        (outcome,) = calls.ask(what, 1, **fields)
        if isinstance(outcome, CallError):
            raise outcome
        return outcome

    def many(what, prompts, **fields):
        if isinstance(prompts, (str, bytes, dict)) or not hasattr(prompts, "__iter__"):
            raise TypeError(f"{what} takes a list of prompts, not a {type(prompts).__name__}.")
        listed = jsonable.plain(list(prompts), f"{what}: the list of prompts")
        return calls.ask(what, len(listed), prompts=listed, batch=True, **fields) if listed else []

    def llm_query(prompt, model=None, *, schema=None):
        """The reply of a sub-LM to one prompt: a str, or the parsed value with a JSON `schema`.
        Raises CallError. A list of texts is many prompts, as with llm_batch."""
        if type(prompt) in (list, tuple) and prompt and all(isinstance(p, str) for p in prompt):
            return llm_batch(prompt, model, schema=schema)
        prompts = [jsonable.plain(prompt, "llm_query: the prompt")]
        return one(
            "llm_query", method="llm", prompts=prompts, **_options(model=model, schema=schema)
        )

    def llm_batch(prompts, model=None, *, schema=None):
        """The replies to many prompts, asked all at once, in order. A failed one is a CallError in
        its place."""
        return many("llm_batch", prompts, method="llm", **_options(model=model, schema=schema))

    def rlm_query(prompt, question=None, *, schema=None):
        """The answer of a child run with a REPL of its own, whose `context` is the prompt. Raises
        CallError."""
        prompts = [jsonable.plain(prompt, "rlm_query: the prompt")]
        return one(
            "rlm_query", method="rlm", prompts=prompts, **_options(question=question, schema=schema)
        )

    def rlm_batch(prompts, question=None, *, schema=None):
        """The answers of many child runs, in order. A failed one is a CallError in its place."""
        return many(
            "rlm_batch", prompts, method="rlm", **_options(question=question, schema=schema)
        )

    return {
        "llm_query": llm_query,
        "llm_batch": llm_batch,
        "llm_query_batched": llm_batch,
        "rlm_query": rlm_query,
        "rlm_batch": rlm_batch,
        "rlm_query_batched": rlm_batch,
        "CallError": CallError,
    }


def tool(calls: Calls, name: str, description: str):
    """A user's tool as a function that asks the host."""

    def call(*args, **kwargs):
        fields = {"args": jsonable.plain(args, f"{name}: an argument"), "name": name}
        fields["kwargs"] = jsonable.plain(kwargs, f"{name}: an argument")
        (outcome,) = calls.ask(name, 1, method="tool", **fields)
        if isinstance(outcome, CallError):
            raise outcome
        return outcome

    call.__name__ = call.__qualname__ = name
    call.__doc__ = description
    return call


def _options(*, schema=None, **texts) -> dict:
    options = {}
    for name, value in texts.items():
        if value is not None:
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a str, not {type(value).__name__}.")
            options[name] = str.__str__(value)
    if schema is not None:
        if isinstance(schema, type) and schema in TYPES:
            schema = {"type": TYPES[schema]}
        elif hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        if not isinstance(schema, dict):
            raise TypeError(f"schema must be a JSON schema (a dict), not {type(schema).__name__}.")
        options["schema"] = jsonable.plain(schema, "schema")
    return options
