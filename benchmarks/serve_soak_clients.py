"""What the clients of the serving soak do: good requests that are checked, and everything a server
has to put up with."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import jsonschema

PATIENCE = 120.0  # seconds for one request; more is a hang
SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}},
    "required": ["yes", "n"],
    "additionalProperties": False,
}
ACTS = {  # relative frequencies
    "stream": 40,
    "whole": 12,
    "chat": 8,
    "many": 4,
    "schema": 3,
    "cancel": 14,
    "hang_up": 6,
    "too_long": 3,
    "malformed": 4,
    "bad_value": 3,
    "huge_body": 1,
    "slow_head": 1,
    "slow_body": 1,
}
BAD_VALUES = (
    {"temperature": -1},
    {"n": 0},
    {"prompt": []},
    {"logprobs": 99},
    {"top_p": 2},
    {"model": "nobody"},
    {"prompt": [10**8]},
    {"guided_regex": "("},
    {"stop": [""]},
    {"max_tokens": "many"},
)


@dataclass
class Tally:
    """What came of it. `violations` must stay empty."""

    done: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)  # seconds
    gaps: list[float] = field(default_factory=list)  # seconds a token, of each stream that ended
    known: dict[str, str] = field(default_factory=dict)  # request -> its only right answer
    tokens: int = 0

    def wrong(self, what: str) -> None:
        if len(self.violations) < 50 and what[:40] not in {v[:40] for v in self.violations}:
            self.violations.append(what[:400])


class Clients:
    """`count` clients at once until `until()`; each does one thing after another, drawn by its own
    generator."""

    def __init__(self, port: int, model: str, window: int, *, seed: int = 0):
        self.port, self.model, self.window, self.seed = port, model, window, seed
        self.url = f"http://127.0.0.1:{port}/v1"
        self.tally = Tally()

    async def run(self, count: int, until: Callable[[], bool]) -> None:
        timeout = aiohttp.ClientTimeout(total=PATIENCE)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as self.session:
            await asyncio.gather(*(self._client(i, until) for i in range(count)))

    async def _client(self, number: int, until: Callable[[], bool]) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while not until():
            act = rng.choices(list(ACTS), list(ACTS.values()))[0]
            try:
                async with asyncio.timeout(PATIENCE):
                    await getattr(self, f"_{act}")(rng)
                self.tally.done[act] += 1
            except TimeoutError:
                self.tally.wrong(f"{act}: no end within {PATIENCE:.0f} s")
            except (aiohttp.ClientError, OSError) as e:
                self.tally.wrong(f"{act}: {type(e).__name__}: {e}")

    # ---- requests

    def _body(self, rng: random.Random, **fields: Any) -> dict[str, Any]:
        """One of a few hundred requests, so that most are asked more than once."""
        words = random.Random(rng.randrange(100))
        prompt = " ".join(
            words.choice(["def", "return", "if", "loss", "step", "value", "depth", "for", "self"])
            for _ in range(9)
        )
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": words.randint(1, max(2, self.window // 4)),
            "temperature": words.choice([0, 0, 0.9]),
            "seed": words.randrange(3),
            "ignore_eos": words.random() < 0.5,
            **({"stop": ["e s", "\n\n"]} if words.random() < 0.3 else {}),
            **fields,
        }

    def _check(self, body: dict[str, Any], text: str) -> None:
        """The same request has the same answer, whoever else is served."""
        key = json.dumps(
            {k: v for k, v in body.items() if not k.startswith("stream")}, sort_keys=True
        )
        if self.tally.known.setdefault(key, text) != text:
            self.tally.wrong(f"two answers to {key}: {self.tally.known[key]!r} and {text!r}")

    async def _refused(self, response: aiohttp.ClientResponse, *expected: int) -> bool:
        """Whether the request was refused; as it should be, and in the right shape."""
        if response.status == 200 and 200 in expected:
            return False
        raw = await response.read()
        try:
            error = json.loads(raw)["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]
        except (ValueError, KeyError, AssertionError, TypeError):
            self.tally.wrong(f"status {response.status} in another shape: {raw[:200]!r}")
            return True
        self.tally.refused[f"{response.status} {error['code']}"] += 1
        if response.status == 429:
            if "Retry-After" not in response.headers:
                self.tally.wrong("429 without Retry-After")
            await asyncio.sleep(0.2)
        elif response.status not in expected:
            self.tally.wrong(f"status {response.status}, not {expected}: {error['message']}")
        return True

    async def _post(self, body: dict[str, Any], path: str = "/completions") -> Any:
        async with self.session.post(self.url + path, json=body) as response:
            return None if await self._refused(response, 200) else await response.json()

    async def _stream(self, rng: random.Random) -> None:
        body = self._body(rng, stream=True, stream_options={"include_usage": True})
        began, first, text, usage, ended, finish = time.perf_counter(), None, "", None, False, None
        async with self.session.post(f"{self.url}/completions", json=body) as response:
            if await self._refused(response, 200):
                return
            async for raw in response.content:
                if not raw.startswith(b"data: "):
                    continue
                if raw.strip() == b"data: [DONE]":
                    ended = True
                    continue
                chunk = json.loads(raw[6:])
                if "error" in chunk:
                    self.tally.wrong(f"error in a stream: {chunk['error']}")
                    return
                for choice in chunk["choices"]:
                    if choice["text"]:
                        first = first or time.perf_counter()
                        text += choice["text"]
                    finish = choice["finish_reason"] or finish
                usage = chunk.get("usage") or usage
        last = time.perf_counter()
        if not ended or usage is None or finish not in ("stop", "length"):
            self.tally.wrong(
                f"a stream without its end: [DONE] {ended}, usage {usage}, finish {finish}"
            )
            return
        self._check(body, text)
        self.tally.tokens += usage["completion_tokens"]
        if first is not None:
            self.tally.ttft.append(first - began)
            if usage["completion_tokens"] > 1:
                self.tally.gaps.append((last - first) / (usage["completion_tokens"] - 1))

    async def _whole(self, rng: random.Random) -> None:
        body = self._body(rng)
        if (reply := await self._post(body)) is not None:
            self._check(body, reply["choices"][0]["text"])
            self.tally.tokens += reply["usage"]["completion_tokens"]

    async def _chat(self, rng: random.Random) -> None:
        body = self._body(rng)
        body["messages"] = [{"role": "user", "content": body.pop("prompt")[: self.window // 4]}]
        body["max_tokens"] = min(body["max_tokens"], self.window // 4)
        if (reply := await self._post(body, "/chat/completions")) is not None:
            self._check(body, reply["choices"][0]["message"]["content"])

    async def _many(self, rng: random.Random) -> None:
        body = self._body(rng, n=2)
        body["prompt"] = [body["prompt"], "def", "return x"]
        if (reply := await self._post(body)) is not None:
            self._check(body, json.dumps([c["text"] for c in reply["choices"]]))
            if [c["index"] for c in reply["choices"]] != list(range(6)):
                self.tally.wrong("three prompts with n=2 did not give six choices")

    async def _schema(self, rng: random.Random) -> None:
        body = self._body(rng, prompt="x", max_tokens=40, guided_json=SCHEMA, temperature=0.9)
        body.pop("stop", None)
        if (reply := await self._post(body)) is not None:
            jsonschema.validate(json.loads(reply["choices"][0]["text"]), SCHEMA)
            self._check(body, reply["choices"][0]["text"])

    # ---- clients that leave

    async def _cancel(self, rng: random.Random) -> None:
        body = self._body(rng, stream=True, ignore_eos=True)
        async with self.session.post(f"{self.url}/completions", json=body) as response:
            if await self._refused(response, 200):
                return
            for _ in range(rng.randrange(6)):
                await response.content.readline()
            response.close()

    async def _hang_up(self, rng: random.Random) -> None:
        raw = json.dumps(self._body(rng, ignore_eos=True)).encode()
        await self._raw(rng, self._head(len(raw)) + raw, rng.random() * 0.3)

    # ---- what is refused

    async def _too_long(self, rng: random.Random) -> None:
        body = self._body(rng, prompt="word " * self.window * 2)
        async with self.session.post(f"{self.url}/completions", json=body) as response:
            await self._refused(response, 400)

    async def _malformed(self, rng: random.Random) -> None:
        raw = rng.choice(
            [b"{", b"", b"\xff\xfe\x00", b"[" * 9_000, b'{"model": ' + rng.randbytes(50)]
        )
        headers = {"Content-Type": "application/json"}
        async with self.session.post(
            f"{self.url}/completions", data=raw, headers=headers
        ) as response:
            await self._refused(response, 400)

    async def _bad_value(self, rng: random.Random) -> None:
        body = self._body(rng, **rng.choice(BAD_VALUES))
        async with self.session.post(f"{self.url}/completions", json=body) as response:
            await self._refused(response, 400, 404)

    async def _huge_body(self, rng: random.Random) -> None:
        answer = await self._raw(rng, self._head(1 << 30), 5.0)
        if b" 413 " not in answer.split(b"\r\n")[0]:
            self.tally.wrong(f"a huge body was answered with {answer[:100]!r}")

    async def _slow_head(self, rng: random.Random) -> None:
        head = self._head(100)
        await self._raw(rng, head[: rng.randrange(1, len(head) - 4)], rng.random() * 3)

    async def _slow_body(self, rng: random.Random) -> None:
        await self._raw(rng, self._head(10_000) + b'{"model"', rng.random() * 3)

    def _head(self, length: int) -> bytes:
        return (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {length}\r\n\r\n"
        ).encode()

    async def _raw(self, rng: random.Random, data: bytes, wait: float) -> bytes:
        """Send these bytes, read for a while, and leave."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            await writer.drain()
            try:
                return await asyncio.wait_for(reader.read(4096), wait)
            except TimeoutError:
                return b""
        finally:
            writer.transport.abort()
