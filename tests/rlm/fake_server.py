"""A loopback model server for tests and benchmarks: OpenAI chat completions and Anthropic messages,
no dependencies.

    with FakeServer(lambda body: "hello") as server:
        OpenAILM("fake", base_url=server.url, api_key="k")

`reply` decides what each request gets: a text, `Say`, `Fail`, `Cut`, `Hang` or `Raw`; a list of
them, in order (the last one again afterwards); or a function of the request's JSON body. It runs in
a thread of this process, or, so that a benchmark's client has its process to itself, in another
one: `with spawn("hello", latency=0.05) as server`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

JSON_TYPE = "application/json"


@dataclass(frozen=True)
class Say:
    """A reply. `usage` None counts one token for four characters; False leaves usage out, as some
    servers do."""

    text: str | None = ""
    tool_calls: tuple[tuple[str, str], ...] = ()  # (name, arguments as text)
    finish: str | None = None  # default: tool_calls or stop
    usage: dict[str, Any] | bool | None = None
    reasoning: str | None = None
    pieces: int = 3  # a streamed reply comes in about so many
    latency: float | None = None  # default: the server's
    between: float = 0.0  # seconds between streamed pieces
    comments: bool = False  # send `: keep-alive` lines between events
    done: bool = True  # end a stream with [DONE]
    fields: dict[str, Any] = field(default_factory=dict)  # more fields of the message


@dataclass(frozen=True)
class Fail:
    status: int
    message: str = "it failed"
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # instead of an error object


@dataclass(frozen=True)
class Cut:
    """The connection drops: after `pieces` of a stream; without a stream in the middle of the body;
    -1: at once.

    With `error` a stream ends in an error object instead.
    """

    text: str = "one two three"
    pieces: int = 1
    error: dict[str, Any] | None = None


@dataclass(frozen=True)
class Hang:
    """No answer at all (pieces 0), or silence after so many streamed pieces."""

    pieces: int = 0


@dataclass(frozen=True)
class Raw:
    """These bytes are the body; or, with `whole`, everything that goes down the wire before the
    connection closes."""

    body: bytes
    content_type: str = "application/json"
    whole: bool = False


Reply = str | Say | Fail | Cut | Hang | Raw


class Request(NamedTuple):
    path: str
    headers: dict[str, str]  # lower-case names
    body: dict[str, Any]
    connection: int  # number of the connection it came over


class FakeServer:
    """Serves while its `with` block runs. `requests` are those received, `aborted` those whose
    client went away."""

    def __init__(
        self,
        reply: Reply | Sequence[Reply] | Callable[[dict[str, Any]], Reply] = "ok",
        *,
        latency: float = 0.0,
        api_key: str | None = None,
        record: bool = True,
        port: int = 0,
    ):
        self._reply, self._latency, self._key, self._record, self._port = (
            reply,
            latency,
            api_key,
            record,
            port,
        )
        self.requests: list[Request] = []
        self.count = self.connections = self.aborted = self.active = self.max_concurrency = 0
        self._transports: set[asyncio.Transport] = set()

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        """Base URL of the OpenAI-compatible endpoint."""
        return self.origin + "/v1"

    def __enter__(self) -> FakeServer:
        started = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self.serve(started)), daemon=True
        )
        self._thread.start()
        if not started.wait(30):
            raise RuntimeError("the fake server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop may have ended
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    async def serve(self, started: threading.Event | None = None) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await self._loop.create_server(
            lambda: _Connection(self), "127.0.0.1", self._port, backlog=1024
        )
        self._port = server.sockets[0].getsockname()[1]
        if started:
            started.set()
        await self._stop.wait()
        server.close()
        for transport in list(self._transports):
            transport.abort()

    def drop_connections(self) -> None:
        """Close every open connection, as a server does that restarts or tires of an idle
        client."""
        done = threading.Event()

        def drop() -> None:
            for transport in list(self._transports):
                transport.abort()
            self._loop.call_soon(done.set)

        self._loop.call_soon_threadsafe(drop)
        done.wait(30)

    def choose(self, body: dict[str, Any]) -> Reply:
        if callable(self._reply):
            return self._reply(body)
        if isinstance(self._reply, str | Say | Fail | Cut | Hang | Raw):
            return self._reply
        return self._reply[min(self.count, len(self._reply)) - 1]


class _Connection(asyncio.Protocol):
    """HTTP/1.1, one request at a time."""

    def __init__(self, server: FakeServer):
        self.server, self.buffer, self.task = server, bytearray(), None
        server.connections += 1
        self.number = server.connections

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.server._transports.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server._transports.discard(self.transport)
        if self.task and not self.task.done():
            self.server.aborted += 1
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        first, *lines = bytes(self.buffer[:end]).decode("latin-1").split("\r\n")
        headers = {
            k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)
        }
        stop = end + 4 + int(headers.get("content-length", 0))
        if len(self.buffer) < stop:
            return
        raw = bytes(self.buffer[end + 4 : stop])
        del self.buffer[:stop]
        self.task = asyncio.ensure_future(self.handle(first.split()[1], headers, raw))

    async def handle(self, path: str, headers: dict[str, str], raw: bytes) -> None:
        server = self.server
        try:
            body = json.loads(raw) if raw else {}
        except ValueError:
            self.send(400, {"error": {"message": "the body is not JSON"}})
            return
        server.count += 1
        server.active += 1
        server.max_concurrency = max(server.max_concurrency, server.active)
        if server._record:
            server.requests.append(Request(path, headers, body, self.number))
        try:
            await self.answer(path, headers, body)
        finally:
            server.active -= 1

    async def answer(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> None:
        place = path.partition("?")[0]
        wire = (
            ANTHROPIC
            if place.endswith("/messages")
            else OPENAI
            if place.endswith("/chat/completions")
            else None
        )
        given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        if wire is None:
            return self.send(
                404, {"error": {"message": f"no such path: {path}", "type": "not_found_error"}}
            )
        if self.server._key is not None and given != self.server._key:
            return self.send(
                401,
                wire.error(Fail(401, f"Incorrect API key provided: {given}.", "invalid_api_key")),
            )
        reply = self.server.choose(body)
        if isinstance(reply, str):
            reply = Say(reply)
        latency = getattr(reply, "latency", None)
        latency = self.server._latency if latency is None else latency
        if latency:
            await asyncio.sleep(latency)
        if isinstance(reply, Raw):
            if not reply.whole:
                return self.send(200, reply.body, content_type=reply.content_type)
            self.transport.write(reply.body)
            self.transport.close()
        elif isinstance(reply, Fail):
            self.send(reply.status, reply.body or wire.error(reply), reply.headers)
        elif isinstance(reply, Hang) and not reply.pieces:
            await asyncio.Event().wait()
        elif isinstance(reply, Cut) and reply.pieces < 0:
            self.transport.abort()
        elif body.get("stream"):
            await self.stream(wire, reply, body)
        elif isinstance(reply, Cut):
            whole = json.dumps(wire.whole(Say(reply.text), body)).encode()
            self.head(200, len(whole))
            self.transport.write(whole[: len(whole) // 2])
            self.transport.close()
        else:
            self.send(200, wire.whole(reply, body))

    async def stream(self, wire: Any, reply: Say | Cut | Hang, body: dict[str, Any]) -> None:
        self.head(200, None, content_type="text/event-stream")
        say = reply if isinstance(reply, Say) else Say(getattr(reply, "text", "one two three"))
        for index, event in enumerate(wire.events(say, body)):
            if not isinstance(reply, Say) and index == reply.pieces:
                break
            self.chunk((": keep-alive\n\n" if say.comments else "") + event)
            await asyncio.sleep(say.between)
        if isinstance(reply, Hang):
            await asyncio.Event().wait()
        if isinstance(reply, Cut) and reply.error is None:
            return self.transport.close()
        if isinstance(reply, Cut):
            self.chunk(wire.error_event(reply.error))
        self.transport.write(b"0\r\n\r\n")

    def send(
        self,
        status: int,
        body: Any,
        headers: dict[str, str] | None = None,
        content_type: str = JSON_TYPE,
    ) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.head(status, len(raw), headers, content_type)
        self.transport.write(raw)

    def head(
        self,
        status: int,
        length: int | None,
        headers: dict[str, str] | None = None,
        content_type: str = JSON_TYPE,
    ) -> None:
        size = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
        more = "".join(f"{k}: {v}\r\n" for k, v in (headers or {}).items())
        self.transport.write(
            f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\n{size}\r\n{more}\r\n".encode()
        )

    def chunk(self, text: str) -> None:
        raw = text.encode()
        self.transport.write(b"%x\r\n%b\r\n" % (len(raw), raw))


class OPENAI:
    """Shapes of /v1/chat/completions."""

    @staticmethod
    def usage(say: Say, body: dict[str, Any]) -> dict[str, Any] | None:
        if say.usage is False:
            return None
        if isinstance(say.usage, dict):
            return say.usage
        prompt = sum(len(m.get("content") or "") for m in body.get("messages", ())) // 4 + 1
        completion = len(say.text or "") // 4 + 1
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    @staticmethod
    def message(say: Say) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": say.text, **say.fields}
        if say.reasoning is not None:
            message["reasoning_content"] = say.reasoning
        if say.tool_calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{i}",
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for i, (name, arguments) in enumerate(say.tool_calls)
            ]
        return message

    @classmethod
    def whole(cls, say: Say, body: dict[str, Any]) -> dict[str, Any]:
        finish = say.finish or ("tool_calls" if say.tool_calls else "stop")
        choice = {"index": 0, "message": cls.message(say), "finish_reason": finish}
        reply = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": body.get("model", ""),
        }
        usage = cls.usage(say, body)
        return {**reply, "choices": [choice], **({"usage": usage} if usage else {})}

    @classmethod
    def events(cls, say: Say, body: dict[str, Any]) -> Iterator[str]:
        def event(choices: list[Any], **more: Any) -> str:
            head = {
                "id": "chatcmpl-1",
                "object": "chat.completion.chunk",
                "model": body.get("model", ""),
            }
            return "data: " + json.dumps({**head, "choices": choices, **more}) + "\n\n"

        def delta(finish: str | None = None, **fields: Any) -> str:
            return event([{"index": 0, "delta": fields, "finish_reason": finish}])

        if say.reasoning is not None:
            yield delta(reasoning_content=say.reasoning)
        for piece in pieces(say.text or "", say.pieces):
            yield delta(content=piece)
        for i, (name, arguments) in enumerate(say.tool_calls):
            function = {"name": name, "arguments": ""}
            yield delta(
                tool_calls=[
                    {"index": i, "id": f"call_{i}", "type": "function", "function": function}
                ]
            )
            for piece in pieces(arguments, say.pieces):
                yield delta(tool_calls=[{"index": i, "function": {"arguments": piece}}])
        yield delta(say.finish or ("tool_calls" if say.tool_calls else "stop"))
        usage = cls.usage(say, body)
        if usage and (body.get("stream_options") or {}).get("include_usage"):
            yield event([], usage=usage)
        if say.done:
            yield "data: [DONE]\n\n"

    @staticmethod
    def error(fail: Fail) -> dict[str, Any]:
        return {"error": {"message": fail.message, "type": "error", "code": fail.code}}

    @staticmethod
    def error_event(error: dict[str, Any]) -> str:
        return "data: " + json.dumps({"error": error}) + "\n\n"


class ANTHROPIC:
    """Shapes of /v1/messages."""

    STOPS: ClassVar[dict[str | None, str]] = {"length": "max_tokens", "content_filter": "refusal"}

    @classmethod
    def usage(cls, say: Say, body: dict[str, Any]) -> dict[str, Any]:
        if isinstance(say.usage, dict):
            return say.usage
        size = len(json.dumps([body.get("system"), body.get("messages")])) // 4 + 1
        return {"input_tokens": size, "output_tokens": len(say.text or "") // 4 + 1}

    @classmethod
    def blocks(cls, say: Say) -> list[dict[str, Any]]:
        blocks: list[dict[str, Any]] = []
        if say.reasoning is not None:
            blocks.append({"type": "thinking", "thinking": say.reasoning, "signature": "s"})
        if say.text:
            blocks.append({"type": "text", "text": say.text})
        for i, (name, arguments) in enumerate(say.tool_calls):
            blocks.append(
                {
                    "type": "tool_use",
                    "id": f"toolu_{i}",
                    "name": name,
                    "input": json.loads(arguments),
                }
            )
        return blocks

    @classmethod
    def stop(cls, say: Say) -> str:
        return cls.STOPS.get(say.finish) or ("tool_use" if say.tool_calls else "end_turn")

    @classmethod
    def whole(cls, say: Say, body: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": body.get("model", ""),
            "content": cls.blocks(say),
            "stop_reason": cls.stop(say),
            "stop_sequence": None,
            "usage": cls.usage(say, body),
        }

    @classmethod
    def events(cls, say: Say, body: dict[str, Any]) -> Iterator[str]:
        def event(kind: str, **fields: Any) -> str:
            return f"event: {kind}\ndata: " + json.dumps({"type": kind, **fields}) + "\n\n"

        usage = cls.usage(say, body)
        opening = {
            **cls.whole(say, body),
            "content": [],
            "stop_reason": None,
            "usage": {**usage, "output_tokens": 1},
        }
        yield event("message_start", message=opening) + event("ping")
        for i, block in enumerate(cls.blocks(say)):
            field_, kind = {
                "thinking": ("thinking", "thinking_delta"),
                "text": ("text", "text_delta"),
            }.get(block["type"], ("input", "input_json_delta"))
            whole = json.dumps(block["input"]) if field_ == "input" else block[field_]
            yield event(
                "content_block_start",
                index=i,
                content_block={**block, field_: {} if field_ == "input" else ""},
            )
            for piece in pieces(whole, say.pieces):
                key = "partial_json" if field_ == "input" else field_
                yield event("content_block_delta", index=i, delta={"type": kind, key: piece})
            yield event("content_block_stop", index=i)
        yield event(
            "message_delta",
            delta={"stop_reason": cls.stop(say), "stop_sequence": None},
            usage={"output_tokens": usage.get("output_tokens", 0)},
        )
        if say.done:
            yield event("message_stop")

    KINDS: ClassVar[dict[int, str]] = {
        400: "invalid_request_error",
        401: "authentication_error",
        404: "not_found_error",
        429: "rate_limit_error",
        500: "api_error",
        529: "overloaded_error",
    }

    @classmethod
    def error(cls, fail: Fail) -> dict[str, Any]:
        kind = fail.code or cls.KINDS.get(fail.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": fail.message}}

    @staticmethod
    def error_event(error: dict[str, Any]) -> str:
        return "event: error\ndata: " + json.dumps({"type": "error", "error": error}) + "\n\n"


def pieces(text: str, count: int) -> list[str]:
    """`text` in about `count` pieces, none of them empty."""
    size = max(1, -(-len(text) // max(1, count)))
    return [text[i : i + size] for i in range(0, len(text), size)]


class Spawned(NamedTuple):
    url: str
    process: subprocess.Popen


@contextlib.contextmanager
def spawn(text: str = "ok", *, latency: float = 0.0) -> Iterator[Spawned]:
    """The server in a process of its own, answering `text` to everything."""
    command = [sys.executable, "-I", "-S", __file__, json.dumps({"text": text, "latency": latency})]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Spawned(process.stdout.readline().strip(), process)
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def main() -> None:
    """Serve until standard input closes: the parent has ended or wants no more."""
    options = json.loads(sys.argv[1])
    with FakeServer(options["text"], latency=options["latency"], record=False) as server:
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
