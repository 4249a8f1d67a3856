"""Fields of a request that the model server does not know: allowed, without effect, and listed in
the reply."""

import openai
import pytest


@pytest.mark.parametrize("chat", [False, True])
def test_unknown_fields_are_listed(server, chat):
    c = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    asked = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    create = c.chat.completions.create if chat else c.completions.create
    fields = {"model": "small", "max_tokens": 3, "temperature": 0, **asked}
    plain = create(**fields)
    assert plain.usage.model_extra["mor"]["ignored"] == []
    reply = create(**fields, extra_body={"typical_p": 0.2, "a" * 99: 1, "min_p": 0.1})
    assert reply.usage.model_extra["mor"]["ignored"] == ["a" * 64, "typical_p"]
    text = (lambda r: r.choices[0].message.content) if chat else (lambda r: r.choices[0].text)
    assert text(reply) == text(plain)
    *_, last = create(
        **fields, stream=True, stream_options={"include_usage": True}, extra_body={"typical_p": 0.2}
    )
    assert last.usage.model_extra["mor"]["ignored"] == ["typical_p"]
