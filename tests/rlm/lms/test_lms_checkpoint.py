"""A tiny checkpoint with random weights behind the LM protocol: batched calls say what lone ones
say."""

import asyncio
import dataclasses
import json
import subprocess
import sys
import threading

import pytest

from rlm_runtime.errors import LMError, UsageError
from rlm_runtime.lms import resolve
from rlm_runtime.lms.base import LM, Message, Sampling, ToolSpec
from rlm_runtime.lms.checkpoint import CheckpointLM, chat_text

CONTEXT = 128


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from small import random_params, spread_routers

    from mor_jax.config import Config, DepthConfig, ModelConfig
    from mor_jax.data.vocabulary import ByteTokenizer
    from mor_jax.model.lm import LM as Model
    from mor_jax.train.checkpoint import Checkpointer

    tokenizer = ByteTokenizer()
    model = ModelConfig(
        layers=3,
        recursions=3,
        sharing="cycle",
        width=16,
        heads=2,
        kv_heads=1,
        mlp_width=32,
        context=CONTEXT,
        vocab_size=tokenizer.vocab_size,
        init_std=0.4,
        loss_chunk=0,
    )
    config = Config(name="tiny", model=model, depth=DepthConfig(policy="expert_choice"))
    params = spread_routers(random_params(Model.from_config(config)))
    path = tmp_path_factory.mktemp("tiny")
    meta = {"config": dataclasses.asdict(config), "tokenizer": tokenizer.to_json(), "data": "none"}
    with Checkpointer(path / "checkpoints") as to:
        to.save(1, {"params": params}, meta)
    return path


@pytest.fixture(scope="module")
def lm(checkpoint):
    return resolve(f"checkpoint:{checkpoint}")


def ask(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def test_a_plain_reply_ends_where_the_template_begins_another_speakers_line(lm):
    from mor_jax.data.chat import PLAIN_STOPS

    turns = [Message(role=role, content="x") for role in ("system", "user", "assistant")]
    assert lm._stop == PLAIN_STOPS == tuple(f"\n{m.role}:" for m in turns)
    assert all(f"\n{chat_text(turns)}".count(stop) >= 1 for stop in lm._stop)


PROMPTS = [
    "a",
    "bcd",
    "what is it?",
    "x" * 40,
    "the depth of a token",
    "é",
    "1 2 3 4 5",
    "z" * 17,
    "end",
]


def test_it_is_an_lm_with_exact_counts(lm):
    assert isinstance(lm, LM) and lm.window == CONTEXT
    messages = ask("héllo")
    reply = asyncio.run(lm.complete(messages, sampling=Sampling(max_tokens=5)))
    assert (
        reply.usage.input_tokens
        == lm.count_tokens(messages)
        == 1 + len(chat_text(messages).encode())
    )
    assert (
        reply.usage.output_tokens == 5
        and reply.finish_reason == "length"
        and not reply.usage.estimated
    )
    assert lm.price(1000, 1000) == 0.0 == reply.usage.cost_usd


def test_concurrent_calls_say_what_sequential_ones_say(lm):
    limits = [3 + 2 * i for i in range(len(PROMPTS))]

    async def one(i):
        return await lm.complete(ask(PROMPTS[i]), sampling=Sampling(max_tokens=limits[i]))

    async def alone():
        return [await one(i) for i in range(len(PROMPTS))]

    async def together():
        return await asyncio.gather(*map(one, range(len(PROMPTS))))

    def ticks():
        return lm.stats().get("ticks_total", 0)

    begin = ticks()
    first, between = asyncio.run(alone()), ticks()
    second, end = asyncio.run(together()), ticks()
    assert second == first
    assert len({r.text for r in first}) > len(PROMPTS) // 2, (
        "random weights should not say one thing to all"
    )
    assert end - between < (between - begin) / 2, "they shared ticks"


def test_a_short_prompt_keeps_its_room_beside_a_long_one(lm):
    short, long = ask("a"), ask("y" * 90)
    room = CONTEXT - lm.count_tokens(short)

    async def both():
        calls = [lm.complete(m, sampling=Sampling(max_tokens=room)) for m in (short, long)]
        return await asyncio.gather(*calls)

    a, b = asyncio.run(both())
    alone = asyncio.run(lm.complete(short, sampling=Sampling(max_tokens=room)))
    assert a == alone
    assert a.usage.output_tokens == room or a.finish_reason == "stop"
    assert b.usage.output_tokens <= CONTEXT - lm.count_tokens(long)


def test_seeded_samples_repeat_in_any_company(lm):
    async def draw(seed, company):
        sampling = Sampling(temperature=1.0, seed=seed, max_tokens=12)
        others = [
            lm.complete(ask(p), sampling=Sampling(temperature=1.0, max_tokens=4))
            for p in PROMPTS[:company]
        ]
        replies = await asyncio.gather(*others, lm.complete(ask("draw"), sampling=sampling))
        return replies[-1].text

    a, b, other = asyncio.run(draw(7, 0)), asyncio.run(draw(7, 4)), asyncio.run(draw(8, 0))
    assert a == b != other


def test_streamed_pieces_make_up_the_reply_and_stop_strings_end_it(lm):
    whole = asyncio.run(lm.complete(ask("tell"), sampling=Sampling(max_tokens=40)))
    pieces = []
    streamed = asyncio.run(
        lm.complete(ask("tell"), sampling=Sampling(max_tokens=40), on_text=pieces.append)
    )
    assert streamed == whole and "".join(pieces) == whole.text and len(pieces) > 1
    stop = whole.text[5:7]
    cut = asyncio.run(lm.complete(ask("tell"), sampling=Sampling(max_tokens=40, stop=(stop,))))
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
    assert cut.usage.output_tokens < whole.usage.output_tokens


def test_a_prompt_that_does_not_fit_names_both_numbers(lm):
    messages = ask("w" * 500)
    with pytest.raises(LMError, match=rf"{lm.count_tokens(messages)} tokens.* {CONTEXT}") as e:
        asyncio.run(lm.complete(messages))
    assert e.value.kind == "context_overflow"


def test_a_wrong_sampling_and_a_failing_callback_reach_the_caller(lm):
    with pytest.raises(LMError, match="temperature") as e:
        asyncio.run(lm.complete(ask("a"), sampling=Sampling(temperature=-1)))
    assert e.value.kind == "bad_request"

    def refuse(_):
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        asyncio.run(lm.complete(ask("a"), on_text=refuse))


def test_cancelling_a_call_ends_its_work_and_no_thread_stays(lm):
    asyncio.run(lm.aclose())
    before = set(threading.enumerate())

    async def main():
        seen = asyncio.Event()
        task = asyncio.create_task(
            lm.complete(ask("a"), sampling=Sampling(max_tokens=100), on_text=lambda _: seen.set())
        )
        await seen.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await lm.aclose()
        assert not [t for t in set(threading.enumerate()) - before if t.name == "engine"]
        return await lm.complete(ask("b"), sampling=Sampling(max_tokens=2))  # usable again

    assert asyncio.run(main()).usage.output_tokens == 2
    asyncio.run(lm.aclose())


def test_generation_that_fails_is_an_lm_error_and_the_next_call_works(lm, monkeypatch):
    from mor_jax.inference.engine.device import Device

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as m:
        m.setattr(Device, "tick", broken)
        with pytest.raises(LMError, match="out of memory") as e:
            asyncio.run(lm.complete(ask("a")))
    assert e.value.kind == "server"
    assert asyncio.run(lm.complete(ask("a"), sampling=Sampling(max_tokens=2))).usage.calls == 1


def test_template_and_tools_reach_the_prompt(checkpoint, lm):
    seen, engine = [], lm._engine

    def template(messages):
        seen.append(messages)
        return messages[-1].content[:20]

    lm = CheckpointLM(str(checkpoint), template=template, max_tokens=2, model=lm._model)
    lm._engine = engine  # compiled already
    tool = ToolSpec(name="search", description="looks things up")
    asyncio.run(lm.complete(ask("find it"), tools=[tool], schema={"type": "string"}))
    assert "search" in seen[-1][-1].content and '{"type": "string"}' in seen[-1][-1].content
    asyncio.run(lm.aclose())


def test_turns_of_a_conversation_and_siblings_read_what_they_share_once(lm):
    """What fills a chunk is not read again by the next prompt that begins with it."""
    start = "the same long beginning, " * 3  # more than the middle chunk of 64

    def hits():
        return lm.stats().get("prefix_cache_hits_total", 0)

    before = hits()

    async def fan():
        calls = [lm.complete(ask(f"{start}{i}"), sampling=Sampling(max_tokens=2)) for i in range(4)]
        return await asyncio.gather(*calls)

    asyncio.run(fan())
    assert hits() - before >= 3 * 64


def test_a_schema_constrains_what_is_said(lm, monkeypatch):
    pytest.importorskip("llguidance")
    # the schema in words is too long here
    monkeypatch.setattr(lm, "_template", lambda messages: "?")
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    schema["additionalProperties"] = False
    sampling = Sampling(max_tokens=60, temperature=1.0, seed=1)
    reply = asyncio.run(lm.complete(ask("?"), schema=schema, sampling=sampling))
    assert isinstance(json.loads(reply.text)["yes"], bool) and reply.finish_reason == "stop"


def test_depth_of_a_call(lm):
    """Deeper tokens, another text; the same wish, the same text."""

    def say(**extra):
        return asyncio.run(
            lm.complete(
                ask("deep"), sampling=Sampling(max_tokens=20, temperature=1.0, seed=3, extra=extra)
            )
        ).text

    assert say(max_depth=1) == say(max_depth=1) != say(min_depth=3)
    with pytest.raises(LMError, match="depth") as e:
        say(max_depth=7)
    assert e.value.kind == "bad_request"


def test_default_template_reads_plainly():
    messages = [Message(role="system", content="Be brief."), Message(role="user", content="Hi")]
    assert chat_text(messages) == "system: Be brief.\n\nuser: Hi\n\nassistant:"


def test_what_is_no_checkpoint_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=str(tmp_path)):
        resolve(f"checkpoint:{tmp_path}")


def test_without_jax_the_message_says_so():
    code = (
        "import sys; sys.modules['jax'] = None\n"
        "from rlm_runtime.lms import resolve\n"
        "from rlm_runtime.errors import UsageError\n"
        "try: resolve('checkpoint:x')\n"
        "except UsageError as e: print(e)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "needs jax" in out.stdout, out.stderr


def test_a_checkpoint_is_asked_with_the_chat_template_it_was_trained_with(tmp_path):
    from small import random_params

    from mor_jax.config import Config, DepthConfig, ModelConfig
    from mor_jax.data.chat import CHATML, CHATML_TOKENS, ChatTemplate
    from mor_jax.data.tokenizer import train_bpe
    from mor_jax.model.lm import LM as Model
    from mor_jax.train.checkpoint import Checkpointer

    tokenizer = train_bpe(["user assistant system hello, what is it?\n" * 9], 320, CHATML_TOKENS)
    model = ModelConfig(
        layers=3,
        recursions=3,
        sharing="cycle",
        width=16,
        heads=2,
        kv_heads=1,
        mlp_width=32,
        context=CONTEXT,
        vocab_size=384,
        init_std=0.4,
        loss_chunk=0,
    )
    config = Config(name="tiny", model=model, depth=DepthConfig(policy="fixed"))
    meta = {"config": dataclasses.asdict(config), "tokenizer": tokenizer.to_json(), "data": "none"}
    with Checkpointer(tmp_path / "checkpoints") as to:
        to.save(1, {"params": random_params(Model.from_config(config))}, meta)
    plain = CheckpointLM(str(tmp_path))
    template = ChatTemplate(CHATML)
    template.save(tmp_path)
    messages = [Message(role="system", content="hello"), *ask("what is <|im_end|> it?")]
    for path in (tmp_path, tmp_path / "checkpoints"):
        lm = CheckpointLM(str(path))
        dicts = [{"role": m.role, "content": m.content} for m in messages]
        assert lm._ids(messages) == template.ids(tokenizer, dicts) != plain._ids(messages)
        assert lm._request([1], 1, Sampling(), None).stop_tokens == template.stop_tokens(tokenizer)
        # the text of a message forges no turn
        assert lm._ids(messages).count(tokenizer.specials["<|im_end|>"]) == 2
    reply = asyncio.run(lm.complete(messages, sampling=Sampling(max_tokens=4)))
    assert reply.usage.input_tokens == lm.count_tokens(messages)
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(UsageError, match="no valid Jinja"):
        CheckpointLM(str(tmp_path))
