"""Expert runs as data: every sample replays to score 1, asks only for what it shows, and never
meets the other split."""

import asyncio
import inspect
import itertools
import json
import random
import re
from pathlib import Path

import pytest

from rlm_runtime import RLM, training
from rlm_runtime.errors import UsageError
from rlm_runtime.lms.scripted import ScriptedLM
from rlm_runtime.tasks import TASKS
from rlm_runtime.tasks.s_niah import NOISE
from rlm_runtime.training import english, expert, items, readings, splits
from rlm_runtime.training.dressing import ANY
from rlm_runtime.training.experts import multi_round, needles, oolong, verbatim
from rlm_runtime.training.make import Job, _problem, estimate, run

EVERY = [(task, name) for task, e in sorted(expert.experts().items()) for name in e.strategies]
SOURCES = [Path(inspect.getfile(m)).parent for m in (expert, needles)]
WORD = re.compile(r"[A-Za-z0-9]{4,}")


def made(task, strategy, split, folder, seed=7):
    job = Job(task, 0, 3000, strategy)
    return job, asyncio.run(run(job, expert.expert_of(task), seed, split, folder))


def replies(conversations, role):
    """The replies of a conversation that may have been split where the history slid."""
    found = []
    for c in conversations:
        if c.provenance["role"] == role:
            said = [m["content"] for m in c.messages if m["role"] == "assistant"]
            found += said[-c.provenance["replies"] :]
    return found


def test_there_is_an_expert_for_every_task():
    assert set(expert.experts()) == set(TASKS) | {"outside", "absent", "injected"}


@pytest.mark.parametrize(("task", "strategy"), EVERY)
def test_samples_replay_to_score_1_and_say_only_what_they_have_seen(task, strategy, tmp_path):
    for split in splits.SPLITS:
        job, result = made(task, strategy, split, tmp_path)
        assert result.score == 1
        # again, from what is in the file alone
        problem = _problem(
            job, expert.expert_of(task), splits.seed_of(7, split), split, tmp_path / "again"
        )
        root, child = (iter(replies(result.conversations, role)) for role in ("root", "child"))
        lm = ScriptedLM(lambda m, root=root: next(root), window=1024, tokens=estimate)
        sub = ScriptedLM(
            lambda m, child=child, p=problem: (
                next(child) if m[0].role == "system" else p.sub(m[-1].content)
            )
        )
        rlm = RLM(lm, sub, prompt_variant="native", max_depth=2 if job.strategy == "worker" else 1)
        answer = rlm.completion(problem.example.context, problem.example.question)
        assert (
            answer.stop_reason == "answered"
            and problem.task.score(problem.example, answer.answer) == 1
        )
        assert next(root, None) is None and next(child, None) is None
        held = set()  # replies that were held to what they had seen
        for conversation in result.conversations:
            assert estimate("".join(m["content"] for m in conversation.messages[:-1])) <= 1024
            if conversation.provenance["role"] != "sub":
                assert_copied(conversation, held)
                held |= {m["content"] for m in conversation.messages}


KNOWN = set(
    WORD.findall(" ".join(p.read_text() for folder in SOURCES for p in folder.rglob("*.py")))
)


def assert_copied(conversation, held):
    """Whatever a reply says that is not the program's own stands in the messages before it; where
    the history slid, in those of the conversation that the reply is repeated from."""
    seen = set()
    for message in conversation.messages:
        words = set(WORD.findall(re.sub(r"\\n", " ", message["content"])))
        if message["role"] == "assistant" and message["content"] not in held:
            assert words - seen <= KNOWN, words - seen - KNOWN
        seen |= words


def test_mistakes_have_no_loss_and_what_mends_them_has(tmp_path):
    _, result = made("s_niah", "recover", "train", tmp_path)
    (conversation,) = (c for c in result.conversations if c.provenance["role"] == "root")
    wrong, error, *rest = conversation.messages[2:]
    assert wrong["weight"] == 0 and error["content"].startswith("Error: ")
    assert all("weight" not in m for m in rest if m["role"] == "assistant")


# -- held out by construction
TABLES = {
    "needles": (needles.SENTENCES, needles.ONE, needles.MANY, needles.KINDS),
    "rounds": (multi_round.ASK, multi_round.REQUESTS),
    "verbatim": (verbatim.MARKS, verbatim.ASK),
    "oolong": (oolong.WRAP, items.FAMILIES, *items.SENTENCES.values()),
    "readings": (readings.YES, readings.QUOTE, readings.FILLER),
}


@pytest.mark.parametrize("table", itertools.chain(*TABLES.values()), ids=lambda t: str(t[0])[:20])
def test_phrasings_belong_to_one_split(table):
    train, heldout = (set(splits.of_split(table, s)) for s in splits.SPLITS)
    assert train and heldout and not train & heldout and train | heldout == set(table)


def test_label_families_share_no_name():
    train, heldout = (
        {n for f in splits.of_split(items.FAMILIES, s) for n in f} for s in splits.SPLITS
    )
    assert not train & heldout


@pytest.mark.parametrize("make", [splits.word, *splits.STRINGS.values()])
def test_strings_belong_to_one_split(make):
    train, heldout = (
        {make(random.Random(i), s).lower() for i in range(400)} for s in splits.SPLITS
    )
    assert not train & heldout and len(train) > 300 and len(heldout) > 300


def test_seeds_of_the_splits_never_meet_each_other_or_an_evaluations():
    seeds = [[splits.seed_of(s, split) for s in range(100)] for split in splits.SPLITS]
    assert not set(seeds[0]) & set(seeds[1]) and min(map(min, seeds)) >= splits.SEEDS


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"codeqa"}))
def test_problems_of_the_splits_share_no_made_up_word_and_none_with_the_tasks(task, tmp_path):
    found = {}
    for split in splits.SPLITS:
        strategy = next(iter(expert.expert_of(task).strategies))
        problem = _problem(
            Job(task, 0, 3000, strategy), expert.expert_of(task), 5, split, tmp_path / split
        )
        text = problem.example.context.read_text() + problem.example.question
        own = {*KNOWN, *WORD.findall(NOISE)}
        assert {w for w in ANY.findall(text)} <= own
        found[split] = problem.template
    assert found["train"] != found["heldout"]


def test_common_words_are_none_that_the_tasks_draw_from():
    assert not ANY.findall(" ".join(english.common()))


def test_code_of_the_splits_comes_from_other_files(tmp_path):
    paths = {}
    for split in splits.SPLITS:
        problem = _problem(
            Job("codeqa", 0, 8000, "tree"), expert.expert_of("codeqa"), 5, split, tmp_path / split
        )
        paths[split] = set(
            re.findall(r"(?m)^##### file: (.*)$", problem.example.context.read_text())
        )
    assert paths["train"] and paths["heldout"] and not paths["train"] & paths["heldout"]


# -- sub-model samples
def test_readings_are_answered_by_their_prompts():
    for sample in readings.samples(80, 3, "train"):
        prompt, reply = (m["content"] for m in sample.messages)
        if sample.provenance["kind"] in ("value", "quote", "label"):
            assert reply == "not found" or all(line in prompt for line in reply.split("\n"))
        else:
            name = re.search(r"(?:mention|Is|Can) (\S+?)(?:\?| named| be)", prompt)[1]
            assert reply == ("yes" if name in prompt.split("\n", 1)[1] else "no")
    kinds = {s.provenance["kind"] for s in readings.samples(4, 3, "train")}
    assert kinds == {"value", "label", "yes_no", "quote"}


# -- the file
@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "train.jsonl"
    report = training.make(
        ["s_niah", "verbatim", "oolong_labelled"], 24, seed=1, out=path, lengths=[2000]
    )
    assert report.runs == report.written == 24 and not report.failed and report.sub_samples >= 12
    return path


def test_the_same_command_writes_the_same_file(corpus, tmp_path):
    training.make(
        ["s_niah", "verbatim", "oolong_labelled"], 24, seed=1, out=tmp_path / "x", lengths=[2000]
    )
    assert (tmp_path / "x").read_bytes() == corpus.read_bytes()


def test_the_file_is_what_training_reads(corpus, tmp_path):
    from mor_jax.config import DataConfig
    from mor_jax.data.prepare import prepare

    cfg = DataConfig(
        source="files",
        format="chat",
        paths=(str(corpus),),
        holdout=0.2,
        cache_dir=str(tmp_path),
        tokenizer="bpe",
        bpe_vocab=700,
        chat_template="chatml",
    )
    data = prepare(cfg, 2048, progress=False)
    records = [json.loads(line) for line in corpus.read_text().splitlines()]
    spoken = [
        m["content"]
        for r in records
        for m in r["messages"]
        if m["role"] == "assistant" and m.get("weight", 1)
    ]
    assert data.stats["train"]["skipped"] == 0
    told = {m["content"] for r in records for m in r["messages"] if m["role"] != "assistant"}
    for i in range(len(data.train)):
        row = data.train[i]
        text = data.tokenizer.decode(row["tokens"][row["weights"] > 0])
        assert not any(t in text for t in told if len(t) > 60)
        turns = [t for t in text.split("\n\n") if "```repl" in t]
        assert not turns or any(s in text for s in spoken)


def test_the_protocol_takes_few_tokens_of_a_tokenizer_trained_on_such_data(corpus):
    """System prompt and task in ChatML, with the question and without it."""
    from mor_jax.data.chat import CHATML, CHATML_TOKENS, ChatTemplate
    from mor_jax.data.tokenizer import train_bpe

    records = [json.loads(line) for line in corpus.read_text().splitlines()]
    tokenizer = train_bpe(
        ["\n".join(m["content"] for m in r["messages"]) for r in records], 2048, CHATML_TOKENS
    )
    whole, bare = {}, {}
    for record in records:
        if record["messages"][0]["role"] == "system":
            system, task = record["messages"][:2]
            without = {**task, "content": re.sub(r"\AQuestion: .*\n", "", task["content"])}
            kind = record["provenance"]["task"]
            for sizes, second in ((whole, task), (bare, without)):
                sizes.setdefault(kind, set()).add(
                    len(ChatTemplate(CHATML).ids(tokenizer, [system, second]))
                )
    print("with the question", whole, "without", bare)
    assert max(map(max, bare.values())) <= 120
    assert max(whole["s_niah"]) <= 150 and max(whole["verbatim"]) <= 150


# -- what cannot be
@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        (["s_nih"], "task 's_nih' is unknown. There are experts for: absent, codeqa, "),
        ([""], "at least one task"),
    ],
)
def test_bad_input_is_one_clear_message(tasks, says, tmp_path):
    with pytest.raises(UsageError, match=re.escape(says)):
        training.make(tasks, 2, out=tmp_path / "x.jsonl")
    assert not list(tmp_path.iterdir())


def test_an_unknown_split_is_named(tmp_path):
    with pytest.raises(UsageError, match="split: expected one of train, heldout, got 'test'"):
        training.make(["s_niah"], 1, split="test", out=tmp_path / "x.jsonl")
