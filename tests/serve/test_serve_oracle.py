"""What the server says is what the model computes: against plain generation and the full forward
pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from mor_jax.model.lm import CAUSAL
from serve.support import HELLO, greedy


def test_greedy_text_is_that_of_plain_generation(server, small):
    ids = [small.tokenizer.bos, *small.tokenizer.encode("hello")]
    (tokens,) = greedy(small, [ids], 20)
    assert small.tokenizer.eos not in tokens
    for prompt in ("hello", ids, [ids], ["hello"]):
        _, _, body = server.complete(prompt, max_tokens=20, temperature=0)
        assert body["choices"][0]["text"] == small.tokenizer.decode(tokens)
    assert body["usage"]["prompt_tokens"] == len(ids) and body["usage"]["completion_tokens"] == 20


def test_a_chat_is_its_template_completed(server, small):
    _, _, body = server.post("/tokenize", messages=HELLO)
    ids = body["tokens"]
    assert small.tokenizer.decode(ids) == "user: hello\n\nassistant:"
    (tokens,) = greedy(small, [ids], 10)
    text = small.tokenizer.decode([t for t in tokens if t != small.tokenizer.eos])
    _, _, body = server.post(
        "/v1/chat/completions", messages=HELLO, max_tokens=10, temperature=0, ignore_eos=True
    )
    assert body["choices"][0]["message"]["content"] == text.lstrip()


def test_scores_of_prompt_and_reply_are_the_models(server, small):
    """As tools that score a text ask for it: echo, and nothing or one token generated."""
    ids = [small.tokenizer.bos, *small.tokenizer.encode("hello wörld")]
    with jax.set_mesh(small.mesh):
        forward = jax.jit(functools.partial(small.lm.apply, mode=CAUSAL))
        logits = np.asarray(forward(small.params, jnp.asarray([ids])), np.float64)[
            0, :, : small.tokenizer.vocab_size
        ]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for max_tokens in (0, 1):
        _, _, body = server.complete(
            ids, max_tokens=max_tokens, echo=True, logprobs=2, temperature=0
        )
        scored = body["choices"][0]["logprobs"]
        assert (
            len(scored["tokens"]) == len(ids) + max_tokens and scored["token_logprobs"][0] is None
        )
        want = [logprobs[t, token] for t, token in enumerate(ids[1:])]
        np.testing.assert_allclose(scored["token_logprobs"][1 : len(ids)], want, atol=1e-4)
        for t, top in enumerate(scored["top_logprobs"][1 : len(ids)]):
            assert max(top.values()) == max(top[scored["tokens"][t + 1]], *top.values())
            np.testing.assert_allclose(max(top.values()), logprobs[t].max(), atol=1e-4)
        text = body["choices"][0]["text"]
        assert text.startswith("hello wörld") and body["usage"]["completion_tokens"] == max_tokens
        if max_tokens:
            np.testing.assert_allclose(scored["token_logprobs"][-1], logprobs[-1].max(), atol=1e-4)
        offsets = scored["text_offset"]
        assert (
            offsets == sorted(offsets)
            and offsets[:2] == [0, 0]
            and offsets[len(ids) - 1] == len("hello wörl")
        )


def test_a_seed_draws_the_same_again(server):
    def draw(**how):
        return server.complete(max_tokens=12, ignore_eos=True, **how)[2]["choices"][0]["text"]

    assert draw(seed=7) == draw(seed=7) != draw(seed=8)
    assert draw(seed=-1) == draw(seed=-1)
    assert len({draw() for _ in range(3)}) == 3
    assert draw(top_k=1) == draw(temperature=0) == draw(min_p=1.0) == draw(top_p=1e-6)


def test_bias_and_minimum(server):
    text = server.complete(max_tokens=3, logit_bias={"65": 100}, temperature=0)[2]["choices"][0][
        "text"
    ]
    assert text == "AAA"
    _, _, body = server.complete(max_tokens=3, logit_bias={"257": 100}, temperature=0)
    assert body["choices"][0]["text"] == "" and body["choices"][0]["finish_reason"] == "stop"
    _, _, body = server.complete(max_tokens=9, logit_bias={"257": 100}, temperature=0, min_tokens=4)
    assert body["usage"]["completion_tokens"] == 5 and body["choices"][0]["finish_reason"] == "stop"
    _, _, body = server.complete(
        max_tokens=9, logit_bias={"65": 100}, temperature=0, stop_token_ids=[65]
    )
    assert body["choices"][0]["text"] == "" and body["choices"][0]["finish_reason"] == "stop"


def test_tokenize_and_back(server):
    _, _, body = server.post("/tokenize", prompt="hé", return_token_strs=True)
    assert (
        body["tokens"] == [256, 104, 195, 169]
        and body["count"] == 4
        and body["max_model_len"] == 128
    )
    assert body["token_strs"] == ["<|bos|>", "h", "bytes:\\xc3", "bytes:\\xa9"]
    assert server.post("/tokenize", prompt="<|eos|>")[2]["tokens"] == [257], (
        "the spelling alone: which token it is"
    )
    assert (
        len(server.post("/tokenize", prompt="a<|eos|>", add_special_tokens=False)[2]["tokens"]) == 8
    )
    assert server.post("/detokenize", tokens=body["tokens"])[2] == {"prompt": "hé"}


def test_metrics_count_what_was_done(server):
    before = server.metrics.value("vllm:generation_tokens_total", model_name="small")
    server.complete(max_tokens=5, ignore_eos=True)
    server.wait_for(
        lambda: (
            server.metrics.value("vllm:generation_tokens_total", model_name="small") == before + 5
        ),
        "counted",
    )
    text = server.request("GET", "/metrics")[2].decode()
    there = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    small = {"model_name": "small"}
    for name, labels, value in (
        ("vllm:num_requests_running", small, 0),
        ("vllm:num_requests_waiting", small, 0),
        ("vllm:time_to_first_token_seconds_bucket", {**small, "le": "+Inf"}, None),
        ("vllm:inter_token_latency_seconds_sum", small, None),
        ("vllm:e2e_request_latency_seconds_count", small, None),
        ("vllm:request_queue_time_seconds_count", small, None),
        ("mor_jax:lane_occupancy", small, None),
        ("mor_jax:recursion_depth_bucket", {**small, "le": "3.0"}, None),
        ("mor_jax:good_requests_total", small, None),
        ("vllm:request_success_total", {**small, "finished_reason": "length"}, None),
    ):
        found = [s.value for s in there if s.name == name and s.labels == labels]
        assert len(found) == 1 and found[0] == (found[0] if value is None else value), name
    assert all(sample.value >= 0 for sample in there) and "_created" not in text
