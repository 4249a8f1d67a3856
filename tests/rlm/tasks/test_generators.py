"""Every task: the same example from the same seed, at the length that was asked for, with the
answer in the context."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time

import pytest

from rlm_runtime import tasks
from rlm_runtime.errors import UsageError
from rlm_runtime.tasks import s_niah, verbatim, words
from rlm_runtime.tasks.base import parse_length

OFFLINE = [name for name in tasks.TASKS if name != "codeqa"]
LENGTHS = (4_000, 16_000, 60_000)


def perfect(task, example):
    """The reply of somebody who knows."""
    if isinstance(example.answer, list) and example.answer and isinstance(example.answer[0], str):
        return "They are " + ", ".join(example.answer)
    return example.answer


# Anything that changes these changes every number measured before: do it only on purpose.
GOLDEN = {
    "s_niah": "457f782cb4c8162b",
    "s_niah_essay": "15cc891f2a115339",
    "s_niah_uuid": "59760b602090743f",
    "niah_multikey": "150d63b500941d0b",
    "niah_needles": "0baea3e5fe7abbb7",
    "niah_uuids": "f24e71dc97cba6a5",
    "niah_multivalue": "97ebb5c1974e8867",
    "niah_multiquery": "a466aecec26554b1",
    "multi_round": "aea316e3934684aa",
    "multi_round_8": "ed45550f21165515",
    "oolong": "9b318e344e993fe8",
    "oolong_labelled": "4f65281914d43d59",
    "oolong_pairs": "5704165bed163d64",
    "verbatim": "134a4cb3dcc78b7e",
}


@pytest.mark.parametrize("name", OFFLINE)
def test_a_seed_means_the_same_bytes_everywhere(name, tmp_path):
    example = tasks.get(name).example(6000, seed=1, index=2, folder=tmp_path)
    said = json.dumps([example.question, example.answer, example.intro]).encode()
    assert hashlib.sha256(example.context.read_bytes() + said).hexdigest()[:16] == GOLDEN[name]
    other = tasks.get(name).example(6000, seed=2, index=2, folder=tmp_path)
    assert other.context.read_bytes() != example.context.read_bytes()


def test_nothing_depends_on_the_order_of_sets(tmp_path):
    code = (
        "import sys, hashlib; from rlm_runtime import tasks\n"
        "for n in ('niah_multivalue', 'oolong', 'oolong_pairs', 'codeqa'):\n"
        "    e = tasks.get(n).example(5000, folder=sys.argv[1], index=7)\n"
        "    print(hashlib.sha256(e.context.read_bytes()).hexdigest(), e.question, e.answer)\n"
    )
    outs = []
    for salt in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": salt}
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / salt)],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        outs.append(done.stdout)
    assert outs[0] == outs[1] and len(outs[0].splitlines()) >= 4


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_length_is_kept_and_the_answer_is_right(name, length, tmp_path):
    task = tasks.get(name)
    for index in (0, task.per_context + 1):
        example = task.example(length, seed=5, index=index, folder=tmp_path)
        text = example.context.read_text(encoding="utf-8")
        used = (len(text) + len(example.question) + len(example.intro)) / 4
        # whose rule for the number of lines leaves no room for its longest replies
        if not name.startswith("oolong"):
            assert used + task.reply_tokens <= length + 1
        assert used <= length and used + task.reply_tokens > 0.8 * length
        assert task.score(example, perfect(task, example)) == 1.0
        assert (
            task.score(example, "no idea")
            == task.score(example, None)
            == task.score(example, "")
            == 0.0
        )
        assert json.loads(json.dumps([example.answer, example.meta])) == [
            example.answer,
            example.meta,
        ]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_length_too_short_says_so(name, tmp_path):
    with pytest.raises(UsageError, match="too short"):
        tasks.get(name).example(40, folder=tmp_path)


def test_a_tokenizer_sets_the_size(tmp_path):
    def tokenizer(text):  # a word or a mark is a token
        return len(re.findall(r"\w+|[^\w\s]", text))

    for name in OFFLINE:
        task = tasks.get(name)
        example = task.example(6000, folder=tmp_path, tokens=tokenizer)
        counted = tokenizer(example.context.read_text())
        assert counted <= 6000 < (counted + task.reply_tokens + 60) / 0.8, name


@pytest.mark.parametrize(
    "name", ["s_niah", "s_niah_essay", "niah_needles", "multi_round", "oolong", "verbatim"]
)
def test_ten_million_tokens_take_seconds(name, tmp_path):
    began = time.perf_counter()
    example = tasks.get(name).example(2_500_000, folder=tmp_path)  # a quarter, to be quick
    assert time.perf_counter() - began < 15
    assert 9_000_000 < example.context.stat().st_size <= 10_000_000


# -- needles


def needles(name, length, folder, **knobs):
    task = tasks.get(name, **knobs)
    example = task.example(length, seed=3, folder=folder)
    return task, example, example.context.read_text()


@pytest.mark.parametrize("name", [n for n in OFFLINE if "niah" in n])
def test_each_value_that_is_asked_for_stands_in_the_text_once(name, tmp_path):
    task, example, text = needles(name, 20_000, tmp_path)
    found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text)
    asked = [(k, v) for k, v in found if k in example.meta["queries"]]
    assert sorted(v for _, v in asked) == sorted(example.answer)
    assert len(example.answer) == task.values * task.queries
    assert all(text.count(v) == 1 for v in example.answer)
    assert all(key in example.question for key in example.meta["queries"])
    if task.haystack != "needle":
        assert len(found) == task.keys * task.values
    else:
        assert (
            len(found) == len(text.splitlines()) == example.meta["lines"] + 1
            and len({k for k, _ in found}) > 10
        )


def test_the_needles_are_the_same_at_every_length(tmp_path):
    answers = {n: needles("niah_multiquery", n, tmp_path)[1].answer for n in LENGTHS}
    assert len({tuple(a) for a in answers.values()}) == 1


def test_noise_is_the_five_sentences_and_needles_stand_anywhere(tmp_path):
    task = tasks.get("s_niah")
    places = []
    for index in range(40):
        example = task.example(4000, index=index, folder=tmp_path)
        lines = example.context.read_text().splitlines()
        assert set(lines) - {s_niah.NOISE} == {lines[example.meta["places"][0]]}
        places.append(example.meta["places"][0] / len(lines))
    assert min(places) < 0.15 and max(places) > 0.85 and len(set(places)) > 25


def test_needles_in_prose_stand_at_the_forty_depths(tmp_path):
    task = tasks.get("niah_multivalue")
    depths = [round(100 * i / 39) for i in range(40)]
    seen = set()
    for index in range(30):
        example = task.example(4000, index=index, folder=tmp_path)
        allowed = {example.meta["lines"] * d // 100 for d in depths}
        assert set(example.meta["places"]) <= allowed and len(example.meta["places"]) == 4
        seen |= set(example.meta["places"])
    assert len(seen) > 25


def test_the_wording_is_singular_for_one_answer(tmp_path):
    assert "What is the special magic number for" in needles("s_niah", 4000, tmp_path)[1].question
    assert (
        "What are all the special magic numbers for"
        in needles("niah_multivalue", 4000, tmp_path)[1].question
    )
    assert re.search(
        r"for \S+, \S+, \S+, and \S+ mentioned",
        needles("niah_multiquery", 4000, tmp_path)[1].question,
    )


def test_part_of_the_answers_is_part_of_the_score(tmp_path):
    task, example, _ = needles("niah_multivalue", 4000, tmp_path)
    assert task.score(example, f"{example.answer[0]} and {example.answer[1]}") == 0.5
    task, example, _ = needles("niah_uuids", 4000, tmp_path)
    assert task.score(example, example.answer[0].upper()) == 1.0
    assert (
        task.score(example, [example.answer[0]])
        == task.score(example, {"uuid": example.answer[0]})
        == 1.0
    )


# -- multi-round


def test_the_same_request_is_made_as_often_as_asked(tmp_path):
    task = tasks.get("multi_round_8")
    for index in range(5):
        example = task.example(12_000, index=index, folder=tmp_path)
        text = example.context.read_text()
        which, form, topic = re.search(
            r"assistant's (\w+) ([\w ]+) about (.+) in the conversation", example.question
        ).groups()
        rounds = re.findall(r"^User: (.*)\nAssistant: (.*)\n$", text, re.M)
        assert len(rounds) == example.meta["rounds"]
        replies = [
            reply for request, reply in rounds if request == f"Write a {form} about {topic}."
        ]
        number = [
            "first",
            "second",
            "third",
            "fourth",
            "fifth",
            "sixth",
            "seventh",
            "eighth",
        ].index(which)
        assert len(replies) == 8 and len(set(replies)) == 8
        assert example.answer == example.meta["prefix"] + replies[number]
        wrong = example.meta["prefix"] + replies[(number + 1) % 8]
        assert task.score(example, wrong) < 0.9 and task.score(example, replies[number]) == 0.0
        assert task.score(example, example.answer[:-20]) > 0.95


# -- verbatim copy


@pytest.mark.parametrize("content", verbatim.CONTENTS)
def test_blocks_are_copied_exactly_or_not_at_all(content, tmp_path):
    task = tasks.get(f"verbatim:content={content}")
    example = task.example(6000, folder=tmp_path)
    number = example.meta["block"]
    begin, end = f"===== block {number} =====\n", f"\n===== end of block {number} ====="
    text = example.context.read_text()
    assert text.split(begin)[1].split(end)[0] == example.answer and text.count(begin) == 1
    assert 300 < len(example.answer) <= 500
    assert (
        task.score(example, f"```\n{example.answer}\n```")
        == task.score(example, f"\n{example.answer} ")
        == 1.0
    )
    assert task.score(example, example.answer[:-1] + "~") == 0.0


# -- the registry


def test_knobs_and_their_errors(tmp_path):
    task = tasks.get("s_niah:haystack=essay,values=3")
    assert (task.haystack, task.values) == ("essay", 3) and "values-3" in task.name
    assert tasks.get(task) is task
    for spec, words_ in [
        ("s_nia", "Did you mean s_niah"),
        ("nothing", "Known: s_niah"),
        ("s_niah:color=red", "no knob 'color'"),
        ("s_niah:haystack=hay", "expected one of noise"),
        ("s_niah:values", "name:knob=value"),
        ("s_niah:values=0", "at least 1"),
        ("multi_round:needles=99", "from 2 to 8"),
        ("verbatim:content=poems", "expected one of words"),
        ("oolong:group=none", "expected one of counting"),
        ("codeqa:root=/nowhere", "not a folder"),
        ("oolong_pairs:x=1", "no knob"),
    ]:
        with pytest.raises(UsageError, match=re.escape(words_)):
            tasks.get(spec)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8k", 8000),
        ("128K", 128_000),
        ("1M", 10**6),
        ("10m", 10**7),
        ("8192", 8192),
        (500, 500),
        ("1.5k", 1500),
        ("16Ki", 16384),
    ],
)
def test_lengths(text, value):
    assert parse_length(text) == value


@pytest.mark.parametrize("text", ["", "k", "8x", "-3", "0", "nan", "inf", "8kk"])
def test_no_length(text):
    with pytest.raises(UsageError, match="length"):
        parse_length(text)


def test_words_are_many_and_distinct():
    for bank in (
        words.ADJECTIVES,
        words.NOUNS,
        words.PLACES,
        words.PEOPLE,
        words.SUBJECTS,
        words.CLAIMS,
        words.REASONS,
    ):
        assert len(bank) == len(set(bank)) >= 16
    assert len(words.ADJECTIVES) * len(words.NOUNS) > 50_000
