"""A loopback model in a process of its own, as thin as can be: what it costs is in every figure of
every runtime.

    with Served(["first reply", "last reply"], sub="ok", latency=0.05) as server:
        ...  # a client asks server.url + /chat/completions
    server.log  # what was asked, and when

The model named `sub` says always the same, after `latency` seconds; any other model is the root and
gets the script's replies in order (the last one again afterwards). For soak tests a prompt of `sub`
can ask for trouble by its first word: `!fail` is a status of 400, `!busy` one of 500, `!cut` closes
the connection, `!hang` never answers.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COMPLETION = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def _http(status: int, body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


PIECE = 16  # characters of a streamed piece: about four tokens


def _reply(text: str) -> dict[bool, bytes]:
    """The response by whether a stream is asked for."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    whole = _http(200, {**COMPLETION, "choices": [choice], "usage": USAGE})
    chunk = {**COMPLETION, "object": "chat.completion.chunk"}
    deltas: list[dict[str, Any]] = [
        {"content": text[i : i + PIECE]} for i in range(0, len(text), PIECE)
    ]
    choices: list[list[dict[str, Any]]] = [
        [{"index": 0, "delta": d, "finish_reason": None}] for d in deltas
    ]
    choices.append([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    events = [*({**chunk, "choices": c} for c in choices), {**chunk, "choices": [], "usage": USAGE}]
    body = "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n"
    head = f"HTTP/1.1 200 X\r\ncontent-type: text/event-stream\r\ncontent-length: {len(body.encode())}\r\n\r\n"
    return {False: whole, True: (head + body).encode()}


class Model:
    """The script and the log."""

    def __init__(self, replies: list[str], sub: str, latency: float):
        self.replies, self.sub, self.latency = [_reply(r) for r in replies], _reply(sub), latency
        # time.monotonic, which on Linux is the same clock in every process
        self.root_times: list[float] = []
        self.root_bytes: list[int] = []
        self.sub_calls = self.active = self.most = 0
        self.sub_bytes = 0

    async def answer(self, body: bytes) -> bytes | None:
        """The response; None closes the connection."""
        now, asked = time.monotonic(), json.loads(body)
        if asked.get("model") != "sub":
            self.root_times.append(now)
            self.root_bytes.append(len(body))
            return self.replies[min(len(self.root_times), len(self.replies)) - 1][
                bool(asked.get("stream"))
            ]
        self.sub_calls += 1
        self.sub_bytes += len(body)
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            if self.latency:
                await asyncio.sleep(self.latency)
            return await self._trouble(asked) or self.sub[bool(asked.get("stream"))]
        except ConnectionAbortedError:
            return None
        finally:
            self.active -= 1

    async def _trouble(self, asked: dict[str, Any]) -> bytes | None:
        content = asked["messages"][-1]["content"]
        wish = content[:5] if isinstance(content, str) and content.startswith("!") else ""
        if wish == "!fail":
            return _http(400, {"error": {"message": "as asked", "type": "invalid_request_error"}})
        if wish == "!busy":
            return _http(500, {"error": {"message": "as asked", "type": "server_error"}})
        if wish == "!cut":
            raise ConnectionAbortedError
        if wish == "!hang":
            await asyncio.Event().wait()
        return None

    def log(self) -> dict[str, Any]:
        names = ("root_times", "root_bytes", "sub_calls", "sub_bytes", "most")
        return {name: getattr(self, name) for name in names}


class _Connection(asyncio.Protocol):
    """HTTP/1.1, one request at a time."""

    def __init__(self, model: Model):
        self.model, self.parts, self.have, self.need, self.start = model, [], 0, 0, 0
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.parts.append(data)
        self.have += len(data)
        if not self.need:
            whole = b"".join(self.parts)
            self.parts, self.start = [whole], whole.find(b"\r\n\r\n") + 4
            if self.start < 4:
                return
            length = 0
            for line in whole[: self.start].lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            self.need = self.start + length
        if self.have >= self.need:
            whole = b"".join(self.parts)
            body, rest = whole[self.start : self.need], whole[self.need :]
            self.parts, self.have, self.need = [rest] if rest else [], len(rest), 0
            self.task = asyncio.ensure_future(self._serve(body))

    async def _serve(self, body: bytes) -> None:
        response = await self.model.answer(body)
        if response is None:
            self.transport.abort()
        else:
            self.transport.write(response)


async def _main() -> None:
    options = json.loads(sys.stdin.readline())
    model, loop = (
        Model(options["replies"], options["sub"], options["latency"]),
        asyncio.get_running_loop(),
    )
    server = await loop.create_server(lambda: _Connection(model), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)  # until the parent closes it or ends
    print(json.dumps(model.log()), flush=True)


class Served:
    """The server's process. `url` ends in /v1; `log` is there after the block."""

    def __init__(self, replies: list[str], *, sub: str = "ok", latency: float = 0.0):
        self._options = json.dumps({"replies": replies, "sub": sub, "latency": latency})
        self.log: dict[str, Any] = {}

    def __enter__(self) -> Served:
        command = [sys.executable, "-I", "-S", str(Path(__file__))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.process.stdin.write(self._options + "\n")
        self.process.stdin.flush()
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.log = json.loads(self.process.stdout.read() or "{}")
        self.process.stdout.close()
        self.process.wait()


if __name__ == "__main__":
    asyncio.run(_main())
