"""Many more requests than there is key-value memory for: they wait, are moved and computed again,
and none is lost."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from serve.support import batched, greedy, running, small_model

CONTEXT = 96  # the engine's, less than the model's 128
# entries of the core's log in two of the three lanes; a whole context of full depth has 288
ROOM = 52
CLIENTS = 30
NEW = (14, 60)  # tokens of a short reply, which should fit into a small lane, and of a long one


@pytest.fixture(scope="module")
def deep():
    """A model whose tokens go deeper than it says, so that a lane which should do turns out to be
    too small."""
    return small_model("token")


@pytest.fixture(scope="module")
def tight(deep):
    with running(batched(deep, lanes=3, context=CONTEXT, entries=ROOM)) as server:
        yield server


@pytest.fixture(scope="module")
def wanted(deep):
    """(prompt, length, text of plain generation) of each client."""
    rng = np.random.default_rng(0)
    prompts = [
        [deep.tokenizer.bos, *rng.integers(97, 122, n).tolist()]
        for n in rng.integers(9, 12, CLIENTS)
    ]
    lengths = [NEW[i % 5 == 4] for i in range(CLIENTS)]
    rows = greedy(deep, prompts, max(NEW))
    return [
        (p, n, deep.tokenizer.decode(row[:n]))
        for p, n, row in zip(prompts, lengths, rows, strict=True)
    ]


def ask(server, prompt, length, stream):
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)
    fields = {"model": "small", "prompt": prompt, "max_tokens": length, "temperature": 0}
    fields["extra_body"] = {"ignore_eos": True}
    if not stream:
        reply = client.completions.create(**fields)
        return reply.choices[0].text, reply.choices[0].finish_reason, reply.usage.model_extra["mor"]
    *chunks, last = client.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    text = "".join(chunk.choices[0].text for chunk in chunks)
    return text, chunks[-1].choices[0].finish_reason, last.usage.model_extra["mor"]


def test_all_of_them_end_with_the_tokens_they_have_alone(tight, wanted, monkeypatch):
    gate, device, health = threading.Event(), tight.model.service.device, []
    monkeypatch.setattr(device, "tick", lambda tick=device.tick: (gate.wait(60), tick())[1])

    def inside():
        return tight.stat("num_requests_running") + tight.stat("num_requests_waiting")

    with ThreadPoolExecutor(CLIENTS) as pool:
        replies = [
            pool.submit(ask, tight, prompt, length, stream=i % 2 == 0)
            for i, (prompt, length, _) in enumerate(wanted)
        ]
        try:
            tight.wait_for(lambda: inside() == CLIENTS, "all are in the engine")
            assert (
                tight.stat("num_requests_running") <= 3
                and tight.request("GET", "/health")[0] == 200
            )
        finally:
            gate.set()
        while not all(reply.done() for reply in replies):
            health.append(tight.request("GET", "/health")[0])
        told = [reply.result() for reply in replies]
    for (_, _, text), (got, reason, _) in zip(wanted, told, strict=True):
        assert (got, reason) == (text, "length")
    assert set(health) == {200}
    preempted = [notes["preempted"] for *_, notes in told]
    assert sum(map(bool, preempted)) > CLIENTS // 4, (
        "memory was given up by some, and their tokens computed again"
    )
    assert tight.stat("num_preemptions_total") == sum(preempted)
    nothing_is_left(tight)


def test_one_request_of_more_sequences_than_there_are_lanes(tight, wanted):
    client = openai.OpenAI(base_url=tight.url, api_key="none", max_retries=0)
    short = [(prompt, text) for prompt, length, text in wanted if length == NEW[0]]
    reply = client.completions.create(
        model="small",
        prompt=[prompt for prompt, _ in short],
        max_tokens=NEW[0],
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert [choice.text for choice in reply.choices] == [text for _, text in short]
    nothing_is_left(tight)


def test_clients_that_leave_in_the_middle_give_their_memory_back(tight, wanted):
    open_ = [
        tight.open(prompt=p, max_tokens=(14, 80)[i % 2], stream=i % 4 > 1)
        for i, (p, *_) in enumerate(wanted)
    ]
    tight.wait_for(lambda: tight.stat("num_requests_running") > 0, "some run")
    for connection in open_:
        connection.close()
    prompt, length, text = wanted[4]
    assert ask(tight, prompt, length, stream=False)[:2] == (text, "length")
    nothing_is_left(tight)


@pytest.mark.parametrize(
    ("prompt", "fields", "param", "numbers"),
    [
        ([65] * CONTEXT, {}, "prompt", ["96", "96"]),
        ([65] * 50, {"max_tokens": 60}, "max_tokens", ["96", "50", "60"]),
    ],
)
def test_what_can_never_fit_is_refused_at_once_and_by_name(tight, prompt, fields, param, numbers):
    """Too long for this engine, though not for the model."""
    client = openai.OpenAI(base_url=tight.url, api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError) as e:
        client.completions.create(model="small", prompt=prompt, **fields)
    assert e.value.code == "context_length_exceeded" and e.value.param == param
    assert e.value.type == "invalid_request_error" and all(n in e.value.message for n in numbers)
    nothing_is_left(tight)


def test_what_just_fits_does(tight):
    """A whole context at full depth, while the other lanes are taken."""
    others = [tight.open(max_tokens=14) for _ in range(6)]
    client = openai.OpenAI(base_url=tight.url, api_key="none", max_retries=0)
    fields = {"ignore_eos": True, "min_depth": 3, "return_depths": True}
    reply = client.completions.create(
        model="small", prompt=[65] * 50, max_tokens=CONTEXT - 50, extra_body=fields
    )
    assert reply.choices[0].model_extra["mor"]["depths"] == [3] * (CONTEXT - 50)
    assert [other.getresponse().status for other in others] == [200] * 6
    nothing_is_left(tight)


def nothing_is_left(server):
    def idle():
        return not any(server.stat(f"num_requests_{state}") for state in ("running", "waiting"))

    server.wait_for(lambda: idle() and server.admission.running == 0, "everything has ended")
    assert server.stat("kv_cache_usage_perc") == 0 and server.stat("compilations_total") == 0
    assert server.request("GET", "/health")[0] == 200
