"""The official client against the server: every answer passes its strict models, every error
becomes its exception."""

import asyncio
import json

import openai
import pytest

from serve.support import HELLO


def client(server, strict=True):
    """Strict: what the server sends must be of the client's types. Not for streams of completions:
    there OpenAI itself sends a finish_reason of null, which the client's type has not."""
    return openai.OpenAI(
        base_url=server.url, api_key="none", max_retries=0, _strict_response_validation=strict
    )


def test_models(server):
    c = client(server)
    (model,) = c.models.list()
    assert model.id == "small" and model.model_extra["max_model_len"] == 128
    assert c.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError) as e:
        c.models.retrieve("other")
    assert e.value.code == "model_not_found" and "small" in str(e.value)


def test_completion_and_its_stream_are_the_same(server):
    c = client(server)
    fields = {
        "model": "small",
        "prompt": ["hello", "hé"],
        "max_tokens": 12,
        "n": 2,
        "seed": 5,
        "temperature": 0.8,
    }
    whole = c.completions.create(**fields)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.usage.prompt_tokens == 6 + 4 and whole.usage.completion_tokens <= 48
    loose = client(server, strict=False)
    chunks = list(
        loose.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    )
    usage = chunks[-1].usage
    assert chunks[-1].choices == [] and usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == 10 and usage.total_tokens == 10 + usage.completion_tokens
    texts, ends = [""] * 4, [None] * 4
    for chunk in chunks[:-1]:
        assert chunk.usage is None and chunk.id == chunks[0].id
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts)) == 4, "two samples of a prompt have two seeds"


def test_chat_and_its_stream_are_the_same(server):
    c = client(server)
    fields = {"model": "small", "messages": HELLO, "max_completion_tokens": 10, "seed": 1, "n": 2}
    fields |= {"logprobs": True, "top_logprobs": 3}
    whole = c.chat.completions.create(**fields)
    chunks = list(c.chat.completions.create(**fields, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    for choice in whole.choices:
        mine = [x for chunk in chunks for x in chunk.choices if x.index == choice.index]
        assert "".join(x.delta.content or "" for x in mine) == choice.message.content
        assert mine[-1].finish_reason == choice.finish_reason
        streamed = [t for x in mine if x.logprobs for t in x.logprobs.content]
        assert streamed == choice.logprobs.content and len(streamed) >= 1
        for token in streamed:
            assert token.logprob <= 0 and len(token.top_logprobs) == 3
            assert token.top_logprobs[0].logprob >= token.logprob
            assert token.bytes is None or bytes(token.bytes).decode("utf-8", "replace")
    assert whole.usage.model_extra["mor"]["mean_depth"] >= 0


def test_stop_strings_end_the_text_before_them(server):
    c = client(server)
    fields = {
        "model": "small",
        "prompt": "hello",
        "max_tokens": 40,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    text = c.completions.create(**fields).choices[0].text
    stop = text[7:9]
    assert text.index(stop) > 0
    cut = c.completions.create(**fields, stop=["never there", stop], logprobs=0).choices[0]
    assert cut.text == text[: text.index(stop)] and cut.finish_reason == "stop"
    assert cut.logprobs.text_offset[-1] < len(cut.text)
    stream = client(server, strict=False).completions.create(**fields, stop=stop, stream=True)
    assert "".join(choice.text for chunk in stream for choice in chunk.choices) == cut.text


def test_best_of_gives_the_most_likely(server):
    c = client(server)
    fields = {"model": "small", "prompt": "hello", "max_tokens": 6, "seed": 3, "logprobs": 0}
    all_ = c.completions.create(**fields, n=4).choices
    best = c.completions.create(**fields, n=1, best_of=4).choices

    def mean(choice):
        return sum(choice.logprobs.token_logprobs) / max(1, len(choice.logprobs.token_logprobs))

    assert len(best) == 1 and best[0].text == max(all_, key=mean).text


def test_depth_is_told_and_can_be_bounded(server):
    c = client(server)
    fields = {"model": "small", "prompt": "hello", "max_tokens": 8, "temperature": 0}
    free = c.completions.create(**fields, extra_body={"return_depths": True})
    depths = free.choices[0].model_extra["mor"]["depths"]
    assert (
        len(depths) == free.usage.completion_tokens
        and set(depths) <= {0, 1, 2, 3}
        and len(set(depths)) > 1
    )
    flat = c.completions.create(
        **fields, extra_body={"return_depths": True, "min_depth": 2, "max_depth": 2}
    )
    assert set(flat.choices[0].model_extra["mor"]["depths"]) == {2}
    assert flat.usage.model_extra["mor"]["mean_depth"] == 2


def test_async_client_and_company(server):
    async def main():
        async with openai.AsyncOpenAI(
            base_url=server.url, api_key="x", _strict_response_validation=True
        ) as c:

            def ask(i):
                return c.completions.create(model="small", prompt=f"{i}", max_tokens=5, seed=i)

            together = await asyncio.gather(*(ask(i) for i in range(6)))
            alone = [await ask(i) for i in range(6)]
            assert [r.choices[0].text for r in together] == [r.choices[0].text for r in alone]
            stream = await c.chat.completions.create(
                model="small", messages=HELLO, max_tokens=5, stream=True
            )
            return [chunk async for chunk in stream]

    assert asyncio.run(main())[-1].choices[0].finish_reason in ("stop", "length")


def test_a_client_may_leave_a_stream(server):
    stream = client(server, strict=False).completions.create(
        model="small", prompt="a", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    server.wait_for(lambda: server.stat("num_requests_running") == 0, "the lane is free")


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_json_schema(server, endpoint):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"enum": [1, 2]}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    form = {
        "type": "json_schema",
        "json_schema": {"name": "thing", "schema": schema, "strict": True},
    }
    c = client(server)
    for seed in range(3):
        if endpoint == "chat":
            reply = c.chat.completions.create(
                model="small", messages=HELLO, response_format=form, seed=seed
            )
            text = reply.choices[0].message.content
        else:
            reply = c.completions.create(
                model="small",
                prompt="x",
                max_tokens=100,
                seed=seed,
                extra_body={"response_format": form},
            )
            text = reply.choices[0].text
        value = json.loads(text)
        assert set(value) == {"name", "n"} and len(value["name"]) <= 8 and value["n"] in (1, 2)
        assert reply.choices[0].finish_reason == "stop"


def test_choice_and_json_object(server):
    c = client(server)
    reply = c.chat.completions.create(
        model="small", messages=HELLO, extra_body={"guided_choice": ["yes", "no"]}
    )
    assert reply.choices[0].message.content in ("yes", "no")
    reply = c.completions.create(
        model="small", prompt="x", max_tokens=6, extra_body={"guided_regex": "[ab]{3}"}
    )
    assert len(reply.choices[0].text) == 3 and set(reply.choices[0].text) <= set("ab")
    reply = c.chat.completions.create(
        model="small", messages=HELLO, max_tokens=30, response_format={"type": "json_object"}
    )
    assert reply.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"max_tokens": 1000}, openai.BadRequestError, "max_tokens"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"prompt": "x" * 500}, openai.BadRequestError, "prompt"),
    ],
)
def test_errors_become_the_clients_exceptions(server, fields, error, param):
    with pytest.raises(error) as e:
        client(server).completions.create(**{"model": "small", "prompt": "x", **fields})
    assert e.value.param == param and e.value.body["message"]
