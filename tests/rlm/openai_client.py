"""Questions to an `OpenAILM` on a loopback server, for its tests."""

import asyncio

import pytest

from rlm.fake_server import FakeServer
from rlm_runtime.errors import LMError
from rlm_runtime.lms.base import Message, ToolSpec
from rlm_runtime.lms.openai import OpenAILM

KEY = "sk-test-0123456789abcdef"
HI = [Message(role="system", content="Be brief."), Message(role="user", content="hi")]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
SEARCH = ToolSpec(
    name="search", description="finds", parameters={"type": "object", "properties": {"q": {}}}
)
# One body; a stream that is watched; a stream that nobody watches, which is what a run asks for.
STREAMED = pytest.mark.parametrize(
    "stream", [False, True, None], ids=["whole", "streamed", "unwatched"]
)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in (
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "RLM_PRICES",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


def model(server: FakeServer, **options) -> OpenAILM:
    """`stream=False` unless a test asks: most tests are about one body."""
    return OpenAILM(
        "m",
        **{"base_url": server.url, "api_key": KEY, "backoff": 0.001, "stream": False, **options},
    )


def ask(server, messages=HI, *, stream=False, lm=None, pieces=None, options=None, **call):
    """One reply; with `stream`, through on_text, and what was handed on must be the reply's text;
    with None, as a stream without on_text."""
    if stream is not False:
        options = {"stream": True, **(options or {})}
    lm, pieces = lm or model(server, **(options or {})), [] if pieces is None else pieces
    reply = asyncio.run(lm.complete(messages, on_text=pieces.append if stream else None, **call))
    if stream and not call.get("tools"):
        assert "".join(pieces) == reply.text
    return reply


def fails(server, kind, match=None, **more) -> LMError:
    with pytest.raises(LMError, match=match) as e:
        ask(server, **more)
    assert e.value.kind == kind
    assert KEY not in str(e.value)
    return e.value
