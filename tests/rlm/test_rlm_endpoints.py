"""Runs over endpoints that fail politely: empty replies, filters, prompts cut without a word."""

import asyncio
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.fake_server import FakeServer, Raw, Say
from rlm.loop_helpers import cell
from rlm_runtime import prompts
from rlm_runtime.lms.base import Message, Reply, Usage
from rlm_runtime.lms.openai import OpenAILM
from rlm_runtime.lms.scripted import ScriptedLM
from rlm_runtime.prompts import Helpers
from rlm_runtime.rlm import RLM
from rlm_runtime.rlm.blanks import Windows, least_tokens

ASK = cell("try:\n    out = llm_query('read')\nexcept CallError as e:\n    out = f'{e.kind}: {e}'")
HAND_IN = cell("answer['content'] = out\nanswer['ready'] = True")


def http(server, **options):
    return OpenAILM(
        "m", **{"base_url": server.url, "api_key": "key-000001", "backoff": 0.001, **options}
    )


def run(sub, *, root=(ASK, HAND_IN), context="some text", **options):
    root = root if not isinstance(root, tuple) else ScriptedLM(list(root))
    return RLM(root, sub, environment="unconfined", **options).completion(context, "what?")


# Empty replies

REFUSAL = Raw(
    b'data: {"choices": [{"delta": {"refusal": "I cannot "}}]}\n\ndata: {"choices": [{"delta": {"refusal": "help"}}]}\n\n'
    b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n',
    "text/event-stream",
)


@pytest.mark.parametrize(
    ("first", "asked"),
    [
        (Say(""), 2),
        (Say("  \n "), 2),
        (Say(None, reasoning="I should"), 2),
        (Raw(b'{"choices": []}'), 2),
        (
            Raw(
                json.dumps({"choices": [{"error": {"code": 502, "message": "upstream"}}]}).encode()
            ),
            2,
        ),
    ],
    ids=["empty", "blank", "thought only", "no choices", "error in the choice"],
)
def test_an_empty_reply_is_asked_for_again(first, asked):
    with FakeServer([first, "forty-two"]) as server:
        result = run(http(server))
        assert result.answer == "forty-two" and server.count == asked


@pytest.mark.parametrize(
    ("reply", "kind", "words", "asked"),
    [
        (Say(""), "empty", "empty", 3),
        (Say("", finish="content_filter"), "content_filter", "content filter", 1),
        (
            Say("As I was say", finish="content_filter"),
            "content_filter",
            "It began: As I was say",
            1,
        ),
        (REFUSAL, "content_filter", "It began: I cannot help", 1),
        (Say("", reasoning="let me see " * 50, finish="length"), "truncated", "max_tokens", 1),
        (Raw(b'{"choices": []}'), "empty", "without any choice", 2),
    ],
    ids=[
        "empty",
        "filtered",
        "filtered in the middle",
        "refused",
        "cut while thinking",
        "no choices",
    ],
)
def test_a_reply_that_stays_empty_is_a_typed_error(reply, kind, words, asked):
    with FakeServer(reply) as server:
        answer = run(http(server, max_retries=1)).answer
        assert answer.startswith(f"{kind}: ") and words in answer and server.count == asked


def test_a_reply_cut_while_thinking_is_tried_once_with_more_room():
    def reply(body):
        return Say("", reasoning="hm", finish="length") if body["max_tokens"] < 400 else "forty-two"

    with FakeServer(reply) as server:
        assert run(http(server), sub_sampling={"max_tokens": 100}).answer == "forty-two"
        assert [r.body["max_tokens"] for r in server.requests] == [100, 400]
    with FakeServer(Say("", finish="length")) as server:
        answer = run(http(server), sub_sampling={"max_tokens": 100}).answer
        assert answer.startswith("truncated: ") and server.count == 2


def test_each_try_counts_as_a_call_of_the_budget():
    with FakeServer("") as server:
        result = run(http(server), budget={"sub_calls": 2})
        assert result.answer.startswith("budget: ") and server.count == 2


def test_an_azure_prompt_filter_is_typed_and_final():
    from rlm.fake_server import Fail

    with FakeServer(Fail(400, "The response was filtered", "content_filter")) as server:
        assert run(http(server)).answer.startswith("content_filter: ") and server.count == 1


def test_an_exception_of_a_foreign_model_shows_no_key(monkeypatch, tmp_path):
    monkeypatch.setenv("ACME_API_KEY", "acme0secret0value")

    def broken(messages):
        raise RuntimeError(
            "401 for Bearer abcdefghijkl, key acme0secret0value, sk-proj-abcdefghijkl"
        )

    result = run(ScriptedLM(broken), log_dir=tmp_path)
    written = "".join(p.read_text() for p in tmp_path.rglob("events.jsonl"))
    assert result.answer.startswith("protocol: ") and "401" in result.answer
    assert not any(s in written for s in ("acme0secret0value", "abcdefghijkl"))


def test_an_error_of_a_tool_shows_no_key(monkeypatch, tmp_path):
    monkeypatch.setenv("ACME_API_KEY", "acme0secret0value")

    def search(q: str) -> str:
        raise RuntimeError("GET https://h/search?key=acme0secret0value failed")

    root = (cell("try:\n    out = search('x')\nexcept Exception as e:\n    out = str(e)"), HAND_IN)
    result = run(ScriptedLM([]), root=root, tools=[search], log_dir=tmp_path)
    written = "".join(p.read_text() for p in tmp_path.rglob("events.jsonl"))
    assert "failed" in result.answer and "acme0secret0value" not in written


def test_the_model_alone_scores_nothing_for_an_empty_reply(tmp_path):
    from rlm_runtime.tasks.evaluate import evaluate

    options = {"samples": 1, "out": tmp_path, "show": False}
    found = evaluate(
        ["s_niah"], ["1k"], ["base"], root=ScriptedLM(["", "x"], repeat_last=True), **options
    )
    assert [(r.status, r.score) for r in found.rows] == [("error", None)] and "empty" in found.rows[
        0
    ].error


def test_tool_results_find_their_call_whatever_the_ids():
    from rlm_runtime.lms.base import ToolCall

    calls = tuple(ToolCall(id="", name="double", arguments={"n": n}) for n in (1, 2))
    replies = [Reply(tool_calls=calls, extra={"reasoning_content": "hm"}), Reply(text="done")]
    sub = ScriptedLM(replies)

    def double(n: int) -> int:
        return 2 * n

    assert run(sub, sub_tools=[double]).answer == "done"
    said, *results = sub.messages[1][-3:]
    ids = [c.id for c in said.tool_calls]
    assert len(set(ids)) == 2 and [r.tool_call_id for r in results] == ids
    assert [r.content for r in results] == ["2", "4"] and said.extra == {"reasoning_content": "hm"}


# Windows


LONG = cell(
    "try:\n    out = llm_query(context)\nexcept CallError as e:\n    out = f'{e.kind}: {e}'\nprint(out)"
)
# 55,000 characters, 11,000 words
PROSE = "The quick brown fox jumps over the lazy dog and rests. " * 1000


@pytest.mark.parametrize("how", ["of the model", "of the RLM"])
def test_a_window_is_enforced_for_sub_calls(how):
    with FakeServer("an answer") as server:
        sub = http(server, window=4096) if how == "of the model" else http(server)
        options = {} if how == "of the model" else {"window": 4096}
        answer = run(sub, root=(LONG, HAND_IN), context=PROSE, **options).answer
        fits = f"{prompts.fitting_chars(4096):,} characters"
        assert (
            answer.startswith("context_overflow: ")
            and "4,096" in answer
            and fits in answer
            and server.count == 0
        )
        small = cell(f"out = llm_query(context[:{prompts.fitting_chars(4096)}])")
        assert run(sub, root=(small, HAND_IN), context=PROSE, **options).answer == "an answer"


def truncating(window):
    """A server that reads the end of a prompt and answers as if nothing had been."""

    def reply(body):
        words = sum(len((m.get("content") or "").split()) for m in body["messages"])
        return Say(
            "an answer", usage={"prompt_tokens": min(window, 2 * words), "completion_tokens": 2}
        )

    return reply


def test_a_prompt_cut_without_a_word_is_told_once_and_shrinks_what_fits(caplog):
    short = cell("out = llm_query(context[:5000])\nprint(out)")
    with FakeServer(truncating(2048)) as server, caplog.at_level(logging.WARNING):
        sub, root = http(server), ScriptedLM([LONG, LONG, short, HAND_IN])
        rlm = RLM(root, sub, environment="unconfined")
        result = rlm.completion(PROSE, "what?")
        assert server.count == 2  # the second long prompt was refused here
        told = [m.content for m in root.messages[-1] if "cuts long prompts" in m.content]
        assert len(told) == 1 and f"{prompts.fitting_chars(2048):,} characters" in told[0]
        assert len(result.notes) == 1 and "2,048 of at least 11,000 tokens" in result.notes[0]
        assert sum("cuts long prompts" in r.message for r in caplog.records) == 1
        again = ScriptedLM([short, HAND_IN])
        rlm = RLM(again, sub, environment="unconfined", window=None)
        assert not rlm.completion("x", "what?").notes
    unknown = Helpers(sub_window=None)
    assert f"{unknown.prompt_chars:,} characters fit for sure" in prompts.system(unknown)
    assert unknown.prompt_chars < 50_000


def test_the_next_system_prompt_of_the_same_rlm_knows(tmp_path):
    with FakeServer(truncating(2048)) as server:
        root = ScriptedLM([LONG, HAND_IN, HAND_IN.replace("out", "1")])
        rlm = RLM(root, http(server), environment="unconfined")
        rlm.completion(PROSE, "what?")
        rlm.completion(PROSE, "what?")
        said = root.messages[-1][0].content
        assert (
            f"about {prompts.fitting_chars(2048):,} characters fit" in said
            and "for sure" not in said
        )


def watch(counts_and_texts):
    windows, lm = Windows(), ScriptedLM([])
    found = []
    for count, text in counts_and_texts:
        usage = Usage(calls=1, input_tokens=count, output_tokens=1)
        found.append(windows.watch(lm, [Message(role="user", content=text)], usage))
    return found, windows.of(lm)


def test_what_is_no_cut_is_not_taken_for_one():
    spaces = "x" + " " * 50_000
    assert watch([(40, spaces), (11_500, PROSE)]) == ([False, False], None)
    cached = [
        (13_000, PROSE),
        (7, PROSE),
    ]  # the second time only what was not in the server's cache
    assert watch(cached) == ([False, False], None)
    assert watch([(3, "short " * 900)]) == ([False], None)
    assert watch([(2048, PROSE), (2048, PROSE), (4096, PROSE)]) == ([True, False, False], 4096)
    assert watch([(10, PROSE), (10, PROSE)]) == (
        [False, False],
        None,
    )  # stubs and proxies that send any number


def test_a_conversation_that_is_cut_is_told_from_one_whose_beginning_was_in_the_cache():
    def turn(counted, newest):
        windows, lm = Windows(), ScriptedLM([])
        talk = [
            Message(role="user", content=PROSE),
            Message(role="assistant", content="yes"),
            Message(role="user", content=newest),
        ]
        return windows.watch(lm, talk, Usage(calls=1, input_tokens=counted, output_tokens=1))

    assert turn(2048, "short")  # far more than the newest message has, far less than all
    assert not turn(900, PROSE[:2500])  # what the newest message may have
    assert not turn(13_000, "short")


@given(
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=50), st.integers(1, 200)
)
def test_no_tokenizer_needs_fewer_tokens_than_the_least(words, times):
    """Held to the bytes: even a token of ten bytes a piece needs as many for scripts without
    spaces."""
    text = " ".join(words) * times
    least = least_tokens([Message(role="user", content=text)])
    assert least <= max(len(text.split()), len(text.encode()) / 5)


def test_the_least_of_a_huge_text_is_counted_from_its_beginning():
    text = "word " * 1_000_000
    assert least_tokens([Message(role="user", content=text)]) == pytest.approx(1_000_000, rel=0.01)


# A summary that is empty


def test_an_empty_summary_is_asked_for_once_more():
    from rlm_runtime.rlm import compaction

    class Node:
        history = type("H", (), {"messages": [], "first": None})()
        lm = ScriptedLM([])
        replies = ["", "The summary."]  # noqa: RUF012

        async def call(self, messages, estimate):
            return Reply(text=self.replies.pop(0))

    node = Node()
    assert asyncio.run(compaction._summary(node)) == "The summary."
    node.replies = ["", "", "never asked for"]
    assert (
        asyncio.run(compaction._summary(node)) == "(no summary was given)"
        and len(node.replies) == 1
    )
