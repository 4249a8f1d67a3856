"""The tokenizer of small native models: the protocol in few tokens, and an unknown string spelled
alike everywhere."""

import asyncio
import json
import random

import pytest

from mor_jax.data.chat import CHATML, ChatTemplate
from mor_jax.data.tokenizer import load_tokenizer
from rlm_runtime.training import copying, expert, phrases, splits
from rlm_runtime.training.experts.outside import SORRY
from rlm_runtime.training.make import Job, make, run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(samples of a file, their tokenizer)"""
    folder = tmp_path_factory.mktemp("phrases")
    make(
        ["s_niah"],
        8,
        seed=3,
        out=folder / "a.jsonl",
        lengths=[2000],
        readings_share=0,
        strategies=["extract"],
    )
    phrases.learn(folder / "a.jsonl", folder / "tokenizer.json")
    return folder / "a.jsonl", load_tokenizer(folder / "tokenizer.json")


def test_a_string_is_spelled_alike_behind_a_space_and_a_quotation_mark(made):
    _, tokenizer = made
    rng = random.Random(0)
    for kind in splits.STRINGS.values():
        for _ in range(50):
            text = kind(rng, "heldout")
            alone = tokenizer.encode(text)
            for before, after in ((" ", "."), ('"', '"'), (" ", "?\n"), ("= ", ";")):
                ids = tokenizer.encode(before + text + after)
                assert ids == tokenizer.encode(before) + alone + tokenizer.encode(after)
            assert "".join(tokenizer.token_text(i) for i in alone) == text


def test_the_protocol_costs_few_tokens(made):
    path, tokenizer = made
    chat = ChatTemplate(CHATML)
    for line in path.read_text().splitlines():
        messages = json.loads(line)["messages"]
        assert len(chat.ids(tokenizer, messages[:1], opened=False)) < 10
        # the system prompt, the question, the text's beginning
        assert len(chat.ids(tokenizer, messages[:2])) <= 190
        code = "".join(m["content"] for m in messages if m["role"] == "assistant")
        # the strings in it are spelled letter by letter
        assert len(tokenizer.encode(code)) < 0.4 * len(code)


def test_exercises_copy_from_their_prompt_in_the_words_of_their_split():
    told = {s: list(copying.samples(20, 1, s)) for s in splits.SPLITS}
    for samples in told.values():
        for sample in samples:
            prompt, reply = (m["content"] for m in sample.messages)
            assert reply.count("\n") and all(
                line.strip('"') in prompt for line in reply.split("\n")
            )
    strings = [
        {line for c in told[s][::2] for line in c.messages[1]["content"].split("\n")}
        for s in splits.SPLITS
    ]
    assert not strings[0] & strings[1]


@pytest.mark.parametrize("split", splits.SPLITS)
def test_questions_of_another_kind_and_absent_keys_are_answered_honestly(split, tmp_path):
    result = asyncio.run(
        run(Job("outside", 0, 2000, "decline"), expert.expert_of("outside"), 1, split, tmp_path)
    )
    assert result.score == 1 and SORRY in result.conversations[0].messages[-1]["content"]
    one = expert.expert_of("s_niah")
    for index in range(40):
        problem = one.problem(
            "s_niah", 2000, splits.seed_of(1, split), index, split, tmp_path / str(index)
        )
        if problem.facts["absent"]:
            break
    (key,) = problem.facts["keys"]
    assert key in problem.example.question and key not in problem.example.context.read_text()
    result = asyncio.run(run(Job("s_niah", index, 2000, "extract"), one, 1, split, tmp_path))
    assert result.score == 1 and '"not found"' in result.conversations[0].messages[-1]["content"]
