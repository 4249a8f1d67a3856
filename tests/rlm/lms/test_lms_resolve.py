"""Models by name, their prices, and what the smaller parts promise."""

import asyncio
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlm.fake_server import spawn

from rlm_runtime.errors import UsageError
from rlm_runtime.lms import PROVIDERS, plain, prices, resolve, sse
from rlm_runtime.lms.base import LM, Message, ToolCall, ToolSpec
from rlm_runtime.lms.scripted import ScriptedLM
from rlm_runtime.lms.stops import StopCutter


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "RLM_PRICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "spec", ["gpt-5-mini", "opnai:gpt-5", "scripted:x", "openai:", ":x", "", "openai"]
)
def test_an_unknown_model_names_the_valid_ones(spec):
    with pytest.raises(UsageError) as e:
        resolve(spec)
    assert all(f"{provider}:" in str(e.value) for provider in PROVIDERS) and repr(spec) in str(
        e.value
    )


def test_a_slip_is_pointed_out():
    with pytest.raises(UsageError, match="Did you mean openai:gpt-5"):
        resolve("opnai:gpt-5")
    with pytest.raises(UsageError, match="Did you mean base_url"):
        resolve("openai:m", base_ulr="http://h/v1")
    with pytest.raises(UsageError, match="tokens_per_minute"):
        resolve("openai:m", zzz=1)


def test_options_reach_the_model_and_none_means_default():
    lm = resolve(
        "openai:m", base_url="http://h/v1", api_key=None, timeout=5.0, window=10, price=None
    )
    assert lm.endpoint.timeout == 5.0 and lm.window == 10 and isinstance(lm, LM)


def test_a_model_passes_through():
    lm = ScriptedLM(["x"])
    assert resolve(lm) is lm and isinstance(lm, LM)
    with pytest.raises(UsageError, match="timeout"):
        resolve(lm, timeout=3)
    with pytest.raises(UsageError, match="int"):
        resolve(3)


def test_names_do_not_import_clients():
    """Neither the HTTP client, nor jax, nor the parser of replies is paid for before it is used."""
    code = (
        "import sys\nfrom rlm_runtime import RLM\nfrom rlm_runtime.lms import resolve\n"
        "RLM(resolve('openai:m', base_url='http://h/v1'), resolve('anthropic:m', base_url='http://h'))\n"
        "late = ('aiohttp', 'jax', 'mor_jax', 'genai_prices', 'rlm_runtime.parsing')\n"
        "print([m for m in late if m in sys.modules])\n"
        "lm = resolve('openai:m', base_url='http://127.0.0.1:1/v1')\n"
        "print(lm.window, lm.price(1, 1), 'genai_prices' in sys.modules)\n"
        "import threading\nlm = resolve('openai:m', base_url='http://h/v1'); lm.warm(); lm.warm()\n"
        "[t.join() for t in threading.enumerate() if t.name == 'rlm-import']\n"
        "print('aiohttp' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["[]", "None", "None", "False", "True"], done.stderr


# Prices


def test_the_table_is_sane():
    for name, known in prices.KNOWN.items():
        price = known.price
        assert name.partition(":")[0] in PROVIDERS and known.window >= 100_000
        assert 0 < price.cached <= price.input <= price.output


def test_a_snapshot_costs_what_its_model_costs():
    assert prices.price_of("openai:gpt-4o-2024-11-20") == prices.KNOWN["openai:gpt-4o"].price
    assert prices.price_of("openai:gpt-4o-mini") != prices.price_of("openai:gpt-4o")
    assert prices.price_of("openai:gpt-4o-other") is None


def test_a_price_file(tmp_path, monkeypatch):
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"openai:m": [1, 2], "n": {"input": 3, "output": 4, "cached": 0.5}}))
    assert prices.price_of("openai:m", str(path)) == (1, 2, None)
    monkeypatch.setenv("RLM_PRICES", str(path))
    assert prices.price_of("anything:n").dollars(1_000_000, 0, 500_000) == pytest.approx(1.75)
    assert prices.price_of("openai:gpt-5") == prices.KNOWN["openai:gpt-5"].price
    assert resolve("openai:m", base_url="http://h/v1").price(1_000_000, 1_000_000) == pytest.approx(
        3.0
    )


def test_prices_of_genai_prices_go_first_and_ours_stand_in(monkeypatch):
    listed = prices.market("openai:gpt-5-mini")
    assert (
        listed.price.dollars(1_000_000, 1_000_000) == pytest.approx(2.25)
        and listed.window == 400_000
    )
    tiered = prices.known("anthropic:claude-sonnet-4-5").price  # dearer for long prompts
    assert tiered.dollars(100_000, 0) == pytest.approx(0.3) and tiered.dollars(1_000_000, 0) > 4
    assert tiered.dollars(100_000, 0, 100_000) < tiered.dollars(100_000, 0)
    only_theirs = "openai:gpt-4o-audio-preview"
    assert (
        only_theirs not in prices.KNOWN and prices.known(only_theirs).price.dollars(1000, 1000) > 0
    )
    router = resolve(
        "openai:openai/gpt-oss-20b", base_url="https://openrouter.ai/api/v1", api_key="k"
    )
    assert 0 < router.price(1_000_000, 0) < 1 and router.window >= 100_000
    # your own machine is no vendor
    local = resolve("openai:gpt-oss-20b", base_url="http://127.0.0.1:8000/v1")
    assert local.price(1, 1) is None and local.window is None
    given = resolve("openai:gpt-5-mini", base_url="http://h/v1", price=(1, 1), window=10)
    assert given.price(1_000_000, 0) == 1.0 and given.window == 10
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    assert prices.market("openai:gpt-5-mini") is None and prices.known(only_theirs) is None
    assert prices.known("openai:gpt-5-mini") == prices.KNOWN["openai:gpt-5-mini"]


def test_the_table_agrees_with_genai_prices():
    """Ours is a copy by hand: a price that moved shows here."""
    for name, ours in prices.KNOWN.items():
        listed = prices.market(name)
        assert listed is not None, name
        assert listed.price.dollars(1000, 1000) == pytest.approx(ours.price.dollars(1000, 1000)), (
            name
        )


@pytest.mark.parametrize(
    "bad", [(1,), (1, -2), (1, float("nan")), "no/such/file.json", {"in": 1}, ("a", "b"), 5]
)
def test_a_price_that_is_none(bad):
    with pytest.raises(UsageError, match="price"):
        resolve("openai:m", base_url="http://h/v1", price=bad)


@pytest.mark.parametrize("text", ["[1]", "{", '{"m": {"input": 1}}', '{"m": "free"}'])
def test_a_price_file_that_is_none(tmp_path, text):
    path = tmp_path / "prices.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=str(path)):
        prices.load(path)


# Streams and stop strings


async def collect(chunks):
    async def source():
        for chunk in chunks:
            yield chunk

    return [event async for event in sse.events(source(), 1 << 20)]


FIELDS = st.lists(
    st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=["Cs"]), max_size=8),
    min_size=1,
)


@given(st.lists(FIELDS, max_size=4), st.sampled_from(["\n", "\r\n", "\r"]), st.data())
def test_events_do_not_depend_on_where_the_bytes_are_cut(events, end, data):
    raw = "".join(
        ": note" + end + "".join(f"data: {line}{end}" for line in lines) + "event: e" + end + end
        for lines in events
    )
    raw = raw.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    chunks = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    assert asyncio.run(collect(chunks)) == [("e", "\n".join(lines)) for lines in events]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_events_byte_by_byte(end):
    raw = end.join(["data: a", "data: b", "event: e", "", "data: c", "", ""]).encode()
    assert asyncio.run(collect([bytes([b]) for b in raw])) == [("e", "a\nb"), ("", "c")]


@given(
    st.text("ab\n", max_size=20),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_stop_strings_cut_the_same_however_the_text_arrives(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    cutter = StopCutter(stops)
    shown = [cutter.push(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown.append(cutter.flush())
    assert not any(s in cutter.text for s in stops)
    assert "".join(shown) == cutter.text and text.startswith(cutter.text)
    assert cutter.hit == any(s in text for s in stops)
    if not cutter.hit:
        assert cutter.text == text
    else:
        assert any(text[len(cutter.text) :].startswith(s) for s in stops)


# Tools and schemas in words


def test_tool_calls_in_words():
    tools = [ToolSpec(name="f")]
    assert plain.read_tool_calls('{"tool": "f", "arguments": {"x": 1}}', tools)[0].arguments == {
        "x": 1
    }
    assert plain.read_tool_calls('```json\n{"tool": "f"}\n```', tools)[0].name == "f"
    for text in (
        '{"tool": "g", "arguments": {}}',
        "prose",
        '["f"]',
        "{",
        '{"tool": ["f"]}',
        "[" * 100_000,
    ):
        assert plain.read_tool_calls(text, tools) == ()


def test_requests_in_words_come_after_the_messages():
    history = [
        Message(role="system", content="s"),
        Message(role="user", content="u"),
        Message(role="assistant", tool_calls=(ToolCall(id="1", name="f", arguments={"x": 1}),)),
        Message(role="tool", content="r", tool_call_id="1"),
    ]
    asked = plain.with_tools(history, [ToolSpec(name="f")])
    assert asked[:2] == history[:2] and all(not m.tool_calls and m.role != "tool" for m in asked)
    assert (
        '{"tool": "f", "arguments": {"x": 1}}' in asked[2].content and "\nr\n" in asked[3].content
    )
    assert plain.with_schema([], {"type": "null"})[0].role == "user"
    after = plain.with_schema([Message(role="assistant", content="a")], {})
    assert [m.role for m in after] == ["assistant", "user"]


def test_the_server_in_a_process_of_its_own():
    with spawn("from afar") as server:
        lm = resolve("openai:m", base_url=server.url)
        assert asyncio.run(lm.complete([Message(role="user", content="x")])).text == "from afar"
    assert server.process.returncode == 0
