"""Limits of a run and the one account book that holds them over the whole call tree.

A call is *reserved* before it is made (an upper estimate of its tokens and dollars) and *settled*
to what it really used afterwards, so the sum of what is used and what is in flight never passes a
limit, however many calls run at once.

A call that would pass a limit only because of what others have in flight waits for them to settle:
they nearly always use less than they reserved. It is refused when the limit is really used up. A
reply is cut short (its `max_tokens` lowered) only when nothing else is in flight and less than it
asked for is left.

Scope of the limits: `turns`, `consecutive_errors` and `repeats` hold for each RLM node, the root
and every child RLM alike; everything else is one sum over the tree.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from pydantic import Field

from rlm_runtime.errors import BudgetExceeded
from rlm_runtime.lms.base import Frozen, Usage

Price = Callable[[int, int], float | None]  # dollars of (input tokens, output tokens): `LM.price`

# The largest share of a token or dollar limit that is kept back for the root's last call ("give
# your best answer now").
LAST_CALL_SHARE = 0.25
LAST_CALL_TOKENS = 1024
LOW_SHARE = 0.75


class Budget(Frozen):
    """Limits of one completion; None is no limit.

    A request to a sub-LM counts as one of `sub_calls`, and so does each retry of a reply that does
    not fit its schema, each round of a sub-LM's tool loop, and each child RLM started. The child's
    own turns count as tokens and dollars.
    """

    # replies of a root LM, for each RLM node; its last call is not a turn
    turns: int | None = Field(30, ge=1)
    sub_calls: int | None = Field(None, ge=0)
    input_tokens: int | None = Field(None, ge=1)
    output_tokens: int | None = Field(None, ge=1)
    usd: float | None = Field(None, gt=0)
    # wall time; running calls and cells are cancelled when it is over
    seconds: float | None = Field(None, gt=0)
    # calls that would make a node deeper than this are refused (the root is 0)
    depth: int | None = Field(None, ge=0)
    # failed cells or unusable replies in a row, for each RLM node
    consecutive_errors: int | None = Field(None, ge=1)
    # Turns that brought nothing, for each RLM node: replies in a row that were cut while thinking,
    # or how often the same cells with the same output came back among the last turns. The model is
    # told from the second on.
    repeats: int | None = Field(5, ge=2)

    # reserved for a reply whose sampling sets no max_tokens, under a limit
    reply_tokens: int = Field(8192, ge=1)
    # what the last call may take once `seconds` are over
    last_call_seconds: float = Field(30.0, gt=0)


class Reservation:
    """What one call may use. Ends with exactly one `settle` or `release`; a second one does
    nothing."""

    __slots__ = (
        "_ledger",
        "_price",
        "calls",
        "input_tokens",
        "max_tokens",
        "open",
        "output_tokens",
        "usd",
    )

    def __init__(
        self,
        ledger: Ledger,
        calls: int,
        input_tokens: int,
        output_tokens: int,
        usd: float,
        max_tokens: int | None,
        price: Price | None,
    ):
        self._ledger, self._price = ledger, price
        self.calls, self.input_tokens, self.output_tokens, self.usd = (
            calls,
            input_tokens,
            output_tokens,
            usd,
        )
        self.max_tokens = max_tokens  # what to put into the call's sampling
        self.open = True

    def settle(self, usage: Usage, *, depth: int = 0) -> Usage:
        """Charge what the call really used; returns that, with its cost. An empty usage charges the
        estimate."""
        if not self.open:
            return usage
        if not usage.calls and not usage.input_tokens and not usage.output_tokens:
            usage = usage.model_copy(
                update={"input_tokens": self.input_tokens, "output_tokens": self.output_tokens}
            )
        if usage.cost_usd is None and self._price is not None:
            usage = usage.model_copy(
                update={"cost_usd": self._price(usage.input_tokens, usage.output_tokens)}
            )
        if not usage.calls:
            usage = usage.model_copy(update={"calls": 1})
        self._ledger._close(self, usage, depth)
        return usage

    def release(self, *, sent: bool = True) -> None:
        """The call failed: its tokens come back. One that was sent still counts as a sub-call, so
        that an endpoint that always fails cannot be asked without end."""
        if self.open:
            self._ledger._close(self, None, 0, give_back=0 if sent else self.calls)


class Ledger:
    """The account book of one run, shared by the root, its sub-calls and all its children. Lives in
    one event loop."""

    def __init__(
        self, budget: Budget | None = None, *, clock: Callable[[], float] = time.monotonic
    ):
        self.budget = budget or Budget()
        self._clock = clock
        self._start = clock()
        self.sub_calls = 0
        self.total = Usage()
        self._usd = 0.0
        self.by_depth: dict[int, Usage] = {}
        self._in_flight = 0
        self._held_in = self._held_out = 0
        self._held_usd = 0.0
        self._keep_in = self._keep_out = 0
        self._keep_usd = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()

    # -- time --------------------------------------------------------------------------------------
    @property
    def seconds(self) -> float:
        return self._clock() - self._start

    def seconds_left(self) -> float | None:
        return None if self.budget.seconds is None else self.budget.seconds - self.seconds

    # -- the last call -----------------------------------------------------------------------------
    def keep_for_last_call(self, input_tokens: int, price: Price | None = None) -> None:
        """Keep back, out of every limit, what the root's last call needs: a prompt of
        `input_tokens` and a reply of LAST_CALL_TOKENS, but never more than LAST_CALL_SHARE of a
        limit."""
        b = self.budget
        if b.input_tokens is not None:
            self._keep_in = min(input_tokens, int(b.input_tokens * LAST_CALL_SHARE))
        if b.output_tokens is not None:
            self._keep_out = min(LAST_CALL_TOKENS, int(b.output_tokens * LAST_CALL_SHARE))
        if b.usd is not None and price is not None:
            cost = price(input_tokens, self._keep_out or LAST_CALL_TOKENS) or 0.0
            self._keep_usd = min(cost, b.usd * LAST_CALL_SHARE)

    # -- calls -------------------------------------------------------------------------------------
    async def reserve(
        self,
        *,
        calls: int = 0,
        input_tokens: int = 0,
        max_tokens: int | None = None,
        price: Price | None = None,
        last: bool = False,
    ) -> Reservation:
        """Reserve one model call, waiting for others to settle where that can make room.

        `calls` is what it counts against `sub_calls`, `input_tokens` an upper estimate of its
        prompt, `max_tokens` the bound its sampling sets (None: Budget.reply_tokens, where a limit
        needs a bound). `last` may use what was kept back for the last call. Raises BudgetExceeded
        naming the limit that is used up."""
        while True:
            reservation = self.try_reserve(
                calls=calls,
                input_tokens=input_tokens,
                max_tokens=max_tokens,
                price=price,
                last=last,
            )
            if reservation is not None:
                return reservation
            ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(ticket)
            await ticket

    def try_reserve(
        self,
        *,
        calls: int = 0,
        input_tokens: int = 0,
        max_tokens: int | None = None,
        price: Price | None = None,
        last: bool = False,
    ) -> Reservation | None:
        """As `reserve`, but None where it would wait."""
        b = self.budget
        if calls and b.sub_calls is not None and self.sub_calls + calls > b.sub_calls:
            raise BudgetExceeded("sub_calls", self.sub_calls, b.sub_calls)
        bounded = b.output_tokens is not None or b.usd is not None
        reply = max_tokens if max_tokens is not None else (b.reply_tokens if bounded else None)

        if b.input_tokens is not None:
            room = b.input_tokens - self.total.input_tokens - (0 if last else self._keep_in)
            if input_tokens > room:
                raise BudgetExceeded("input_tokens", self.total.input_tokens, b.input_tokens)
            if input_tokens > room - self._held_in:
                return None
        if b.output_tokens is not None:
            room = b.output_tokens - self.total.output_tokens - (0 if last else self._keep_out)
            assert reply is not None, "a budget with this limit is bounded"
            if room < 1:
                raise BudgetExceeded("output_tokens", self.total.output_tokens, b.output_tokens)
            if reply > room - self._held_out:
                if self._in_flight:
                    return None
                reply = room
        usd = 0.0
        if b.usd is not None:
            dollars = b.usd - self._usd - (0.0 if last else self._keep_usd)
            assert reply is not None, "a budget with this limit is bounded"
            if _cost(price, input_tokens, 1) > dollars:
                raise BudgetExceeded("usd", self._usd, b.usd)
            if _cost(price, input_tokens, reply) > dollars - self._held_usd:
                if self._in_flight:
                    return None
                reply = _affordable(price, input_tokens, reply, dollars)
            usd = _cost(price, input_tokens, reply)

        self.sub_calls += calls
        self._in_flight += 1
        held_out = reply or 0 if bounded else 0
        self._held_in += input_tokens
        self._held_out += held_out
        self._held_usd += usd
        return Reservation(
            self, calls, input_tokens, held_out, usd, reply if bounded else max_tokens, price
        )

    def count_call(self) -> None:
        """Count a child RLM against `sub_calls`; raises BudgetExceeded."""
        limit = self.budget.sub_calls
        if limit is not None and self.sub_calls + 1 > limit:
            raise BudgetExceeded("sub_calls", self.sub_calls, limit)
        self.sub_calls += 1

    def check_depth(self, depth: int) -> None:
        """Raises BudgetExceeded where a node at `depth` would be too deep."""
        if self.budget.depth is not None and depth > self.budget.depth:
            raise BudgetExceeded("depth", depth - 1, self.budget.depth)

    def _close(self, r: Reservation, usage: Usage | None, depth: int, give_back: int = 0) -> None:
        r.open = False
        self._in_flight -= 1
        self._held_in -= r.input_tokens
        self._held_out -= r.output_tokens
        # no float dust once nothing is held
        self._held_usd = self._held_usd - r.usd if self._in_flight else 0.0
        self.sub_calls -= give_back
        if usage is not None:
            self.total = self.total + usage
            self._usd += usage.cost_usd or 0.0
            self.by_depth[depth] = self.by_depth.get(depth, Usage()) + usage
        # all try again, in order; a wrong guess of who fits now would leave a call asleep
        while self._waiting:
            ticket = self._waiting.popleft()
            if not ticket.done():
                ticket.set_result(None)

    def running_low(self) -> dict[str, float]:
        """What is left of each limit of which LOW_SHARE is used up: said to the models only then,
        so that what they read does not differ from run to run."""
        b, used = self.budget, self.snapshot()
        limits = {
            name: getattr(b, name)
            for name in ("sub_calls", "input_tokens", "output_tokens", "usd", "seconds")
        }
        return {
            name: round(max(0, limit - used[name]), 4 if name == "usd" else 0)
            for name, limit in limits.items()
            if limit is not None and used[name] >= LOW_SHARE * limit
        }

    def snapshot(self) -> dict[str, float]:
        """What is used so far, by the names of `Budget`."""
        return {
            "sub_calls": self.sub_calls,
            "input_tokens": self.total.input_tokens,
            "output_tokens": self.total.output_tokens,
            "usd": round(self._usd, 9),
            "seconds": round(self.seconds, 3),
            "in_flight": self._in_flight,
        }


def _cost(price: Price | None, input_tokens: int, output_tokens: int) -> float:
    """`RLM` refuses a dollar limit over an unknown price; here it would silently break the
    limit."""
    cost = price(input_tokens, output_tokens) if price is not None else None
    if cost is None:
        raise BudgetExceeded(
            "usd", 0, 0, "budget: a dollar limit is set and the price of this model is unknown."
        )
    return cost


def _affordable(price: Price | None, input_tokens: int, most: int, dollars: float) -> int:
    """The longest reply, at least 1 token, that keeps the call within `dollars` (prices grow with
    length)."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if _cost(price, input_tokens, middle) <= dollars:
            low = middle
        else:
            high = middle - 1
    return low
