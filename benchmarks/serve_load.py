"""Load on a server that speaks OpenAI's completions: how fast, how soon, how many good.

    python -m launch.serve runs/mor --lanes 16 &
    python -m benchmarks.serve_load --model mor --requests 200 --concurrency 32 --out load.json
    python -m benchmarks.serve_load --model mor --prefix 512 --prompt 32 --output 16 \\
        --concurrency 32
    python -m benchmarks.serve_load --url http://127.0.0.1:9000/v1 --model other --rate 4

First a closed loop (so many clients, each with one request under way), then Poisson arrivals at
shares of the rate it reached; with --rate only arrivals at that rate. Lengths are in words; with
--vocab in tokens, sent as ids.

Times are taken at the client. The first token's is that of the first chunk that carries text: a
token that is only a part of a character shows with the next one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from rlm_runtime.errors import UsageError
from rlm_runtime.serve.http.settings import read_keys

WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "long",
    "text",
    "and",
    "says",
    "what",
    "it",
    "found",
    "there",
    "before",
    "anyone",
    "asks",
    "how",
    "deep",
    "it",
    "had",
    "to",
    "think",
    "about",
    "each",
    "word",
    "while",
    "some",
    "tokens",
    "stop",
    "early",
    "others",
    "go",
    "on",
    "for",
    "all",
    "steps",
    "of",
    "one",
    "shared",
    "core",
]


@dataclass(frozen=True)
class Workload:
    """Prompts of `prefix` shared and `prompt` own words (or token ids, with `vocab`), `output`
    tokens each."""

    model: str
    prompt: int = 64
    prefix: int = 0
    output: int = 64
    vocab: int = 0  # 0: text; else ids from 3 to vocab - 3 are sent, so that lengths are exact
    temperature: float = 0.0
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)  # more fields of the request

    def body(self, index: int) -> dict[str, Any]:
        """The request of this number: always the same."""
        shared = self._piece(random.Random(f"{self.seed} prefix"), self.prefix)
        own = self._piece(random.Random(f"{self.seed} {index}"), self.prompt)
        prompt = shared + own if self.vocab else " ".join([*shared, *own])
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.output,
            "temperature": self.temperature,
            "seed": index,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            **self.extra,
        }

    def _piece(self, rng: random.Random, count: int) -> list[Any]:
        if self.vocab:
            return [rng.randrange(3, max(4, self.vocab - 3)) for _ in range(count)]
        return [rng.choice(WORDS) for _ in range(count)]


@dataclass
class Outcome:
    """One request. Times in seconds from its start; `status` 0: the connection failed or broke
    off."""

    status: int = 0
    error: str = ""
    first: float | None = None
    total: float = 0.0
    late: float = 0.0  # behind its time of arrival when it was sent
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0

    @property
    def ok(self) -> bool:
        return self.status == 200 and not self.error

    @property
    def gap(self) -> float | None:
        """Mean time between tokens."""
        if self.first is None or self.tokens < 2:
            return None
        return (self.total - self.first) / (self.tokens - 1)


async def one(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Outcome:
    """Send one request and read its stream to the end."""
    out, began = Outcome(), time.perf_counter()
    try:
        async with session.post(url, json=body) as response:
            out.status = response.status
            if response.status != 200:
                out.error = (await response.text())[:300]
                return out
            ended = False
            async for raw in response.content:
                line = raw.strip()
                if not line.startswith(b"data: "):
                    continue
                if line == b"data: [DONE]":
                    ended = True
                    break
                read_chunk(out, json.loads(line[6:]), time.perf_counter() - began)
            if not ended:
                out.error = out.error or "the stream broke off"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as e:
        out.error = out.error or f"{type(e).__name__}: {e}"[:300]
    finally:
        out.total = time.perf_counter() - began
    return out


def read_chunk(out: Outcome, chunk: dict[str, Any], now: float) -> None:
    if "error" in chunk:
        out.error = str(chunk["error"])[:300]
        return
    if out.first is None and any(c.get("text") for c in chunk.get("choices", ())):
        out.first = now
    usage = chunk.get("usage")
    if usage:
        out.prompt_tokens, out.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        out.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


async def closed_loop(
    ask: Callable[[int], Awaitable[Outcome]], requests: int, concurrency: int
) -> list[Outcome]:
    """`concurrency` clients, each with one request under way until all are done."""
    numbers, outcomes = iter(range(requests)), []

    async def client() -> None:
        for number in numbers:
            outcomes.append(await ask(number))

    await asyncio.gather(*(client() for _ in range(min(concurrency, requests))))
    return outcomes


async def open_loop(
    ask: Callable[[int], Awaitable[Outcome]],
    requests: int,
    rate: float,
    seed: int = 0,
    first: int = 0,
) -> list[Outcome]:
    """Poisson arrivals, `rate` a second, whether or not earlier ones are done."""
    rng, began, at = random.Random(f"{seed} arrivals"), time.perf_counter(), 0.0

    async def arrive(number: int, at: float) -> Outcome:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        late = time.perf_counter() - began - at
        out = await ask(number)
        out.late = late
        return out

    tasks = []
    for number in range(first, first + requests):
        at += rng.expovariate(rate)
        tasks.append(asyncio.create_task(arrive(number, at)))
    return list(await asyncio.gather(*tasks))


# ---- figures


def quantiles(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean, p50, p90, p99 and the largest, in milliseconds."""
    found = sorted(v for v in values if v is not None)
    if not found:
        return None

    def at(q: float) -> float:
        return round(1e3 * found[min(len(found) - 1, int(q * len(found)))], 2)

    return {
        "mean": round(1e3 * sum(found) / len(found), 2),
        "p50": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "max": round(1e3 * found[-1], 2),
    }


def summary(
    outcomes: Sequence[Outcome], seconds: float, *, goal_ttft: float, goal_gap: float
) -> dict[str, Any]:
    """Figures of one round. Good requests are those within both goals (seconds)."""
    ok = [o for o in outcomes if o.ok]
    good = [o for o in ok if (o.first or 0) <= goal_ttft and (o.gap or 0) <= goal_gap]
    failures = Counter(f"{o.status} {o.error}"[:120] for o in outcomes if not o.ok)
    return {
        "requests": len(outcomes),
        "ok": len(ok),
        "failures": dict(failures.most_common(10)),
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(ok) / seconds, 3),
        "output_tokens_per_second": round(sum(o.tokens for o in ok) / seconds, 2),
        "prompt_tokens_per_second": round(sum(o.prompt_tokens for o in ok) / seconds, 2),
        "cached_share": round(
            sum(o.cached_tokens for o in ok) / max(1, sum(o.prompt_tokens for o in ok)), 4
        ),
        "goodput_requests_per_second": round(len(good) / seconds, 3),
        "good_share": round(len(good) / max(1, len(ok)), 4),
        "ttft_ms": quantiles(o.first for o in ok),
        "token_ms": quantiles(o.gap for o in ok),
        "total_ms": quantiles(o.total for o in ok),
        "sent_late_ms": quantiles(o.late for o in outcomes),
    }


@dataclass(frozen=True)
class Plan:
    """What `measure` does: a closed loop first; then a Poisson round at each share of the rate it
    reached."""

    url: str  # up to /v1
    workload: Workload
    requests: int = 64
    concurrency: int = 8
    loads: tuple[float, ...] = (0.5, 0.8, 0.95)
    rate: float = 0.0  # requests a second; 0: shares of what the closed loop reached
    goal_ttft: float = 1.0
    goal_gap: float = 0.1
    timeout: float = 600.0
    key: str = ""


async def measure(plan: Plan, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """All rounds. Raises UsageError where nothing answers, or every request of a round fails."""
    headers = {"Authorization": f"Bearer {plan.key}"} if plan.key else {}
    timeout = aiohttp.ClientTimeout(total=plan.timeout)
    connector = aiohttp.TCPConnector(limit=0)
    url = plan.url.rstrip("/") + "/completions"
    async with aiohttp.ClientSession(
        headers=headers, timeout=timeout, connector=connector
    ) as session:

        async def ask(number: int) -> Outcome:
            return await one(session, url, plan.workload.body(number))

        warm = await ask(-1)
        if not warm.ok:
            raise UsageError(f"{url} does not answer as it should: {warm.status} {warm.error}")
        rounds = []

        async def play(
            name: str, outcomes: Awaitable[list[Outcome]], **about: Any
        ) -> dict[str, Any]:
            began = time.perf_counter()
            got = await outcomes
            found = summary(
                got, time.perf_counter() - began, goal_ttft=plan.goal_ttft, goal_gap=plan.goal_gap
            )
            if not found["ok"]:
                raise UsageError(f"{name}: no request succeeded: {found['failures']}")
            rounds.append({"round": name, **about, **found})
            say(line(rounds[-1]))
            return found

        n = plan.requests
        if not plan.rate:
            loop = closed_loop(ask, n, plan.concurrency)
            found = await play(
                f"closed, {plan.concurrency} clients", loop, concurrency=plan.concurrency
            )
            rates = {f"{load:.0%} load": load * found["requests_per_second"] for load in plan.loads}
        else:
            rates = {"open": plan.rate}
        # other prompts in each round: none is cached whole
        for number, (name, rate) in enumerate(rates.items(), 1):
            loop = open_loop(ask, n, rate, plan.workload.seed, first=number * n)
            await play(f"{name}, {rate:.2f}/s", loop, rate=round(rate, 4))
    return {"plan": {**asdict(plan), "key": bool(plan.key)}, "rounds": rounds}


def line(found: dict[str, Any]) -> str:
    """A round on one line."""
    ttft, gap = found["ttft_ms"] or {}, found["token_ms"] or {}
    return (
        f"{found['round']}: {found['ok']}/{found['requests']} ok, {found['output_tokens_per_second']:.0f} tok/s, "
        f"{found['requests_per_second']:.2f} req/s, good {found['goodput_requests_per_second']:.2f} req/s; first token "
        f"p50 {ttft.get('p50')} p99 {ttft.get('p99')} ms; per token p50 {gap.get('p50')} p99 {gap.get('p99')} ms"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve_load",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000/v1", help="the server, up to /v1")
    add("--model", required=True, help="name of the model there")
    add("--api_key_file", help="a file whose first line is the API key")
    add("--requests", type=positive, default=64, help="requests of each round")
    add("--concurrency", type=positive, default=8, help="clients of the closed loop")
    add("--loads", default="0.5,0.8,0.95", help="shares of the closed loop's rate; empty: none")
    add(
        "--rate",
        type=float,
        default=0.0,
        help="requests a second, instead of the closed loop and its shares",
    )
    add("--prompt", type=int, default=64, help="words of a prompt that are its own")
    add("--prefix", type=int, default=0, help="words that all prompts begin with")
    add("--output", type=positive, default=64, help="tokens to generate")
    add("--vocab", type=int, default=0, help="send random token ids below this instead of words")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--seed", type=int, default=0, help="of prompts and arrivals")
    add(
        "--goal_ttft",
        type=float,
        default=1.0,
        help="a good request has its first token within so many seconds ...",
    )
    add("--goal_token", type=float, default=0.1, help="... and then one in so many, on average")
    add("--timeout", type=float, default=600.0, help="seconds a request may take")
    add("--out", type=Path, help="where the figures go, as JSON")
    args = parser.parse_args(argv)
    try:
        workload = Workload(
            args.model,
            prompt=args.prompt,
            prefix=args.prefix,
            output=args.output,
            vocab=args.vocab,
            temperature=args.temperature,
            seed=args.seed,
        )
        plan = Plan(
            args.url,
            workload,
            requests=args.requests,
            concurrency=args.concurrency,
            loads=tuple(float(x) for x in args.loads.split(",") if x),
            rate=args.rate,
            goal_ttft=args.goal_ttft,
            goal_gap=args.goal_token,
            timeout=args.timeout,
            key=read_keys(args.api_key_file, "--api_key_file")[0] if args.api_key_file else "",
        )
        found = asyncio.run(
            measure(plan, say=lambda text: print(text, file=sys.stderr, flush=True))
        )
        text = json.dumps(found, indent=1)
        if args.out:
            args.out.write_text(text + "\n", encoding="utf-8")
        else:
            print(text)
    except (UsageError, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
