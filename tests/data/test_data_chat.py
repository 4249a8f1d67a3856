"""Conversations: what has a loss is what a model is asked to say, rows hold whole conversations,
bad records are named."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mor_jax.config import DataConfig
from mor_jax.data.chat import (
    CHATML,
    CHATML_TOKENS,
    PLAIN,
    ChatError,
    ChatTemplate,
    build_template,
)
from mor_jax.data.packing import OPEN_ROWS, Encoded, pack_whole
from mor_jax.data.prepare import prepare
from mor_jax.data.tokenizer import ByteTokenizer, train_bpe
from mor_jax.errors import DataError

BPE = train_bpe(["user assistant system hello there, what is 12 + 30?\n\n" * 9], 330, CHATML_TOKENS)
WAYS = {
    "plain, bytes": (ChatTemplate(), ByteTokenizer()),
    "plain, BPE": (ChatTemplate(), BPE),
    "ChatML, BPE": (ChatTemplate(CHATML), BPE),
}
ways = pytest.mark.parametrize("way", WAYS)
WORDS = st.text(st.sampled_from("ab é\n?12<|im_end|>:"), min_size=1, max_size=12)
TURNS = st.lists(
    st.tuples(WORDS, WORDS.filter(lambda s: not s[0].isspace())), min_size=1, max_size=4
)


def conversation(turns, system=""):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return messages


@ways
@settings(max_examples=60, deadline=None)
@given(turns=TURNS)
def test_every_reply_is_trained_where_the_prompt_of_serving_ends(way, turns):
    template, tokenizer = WAYS[way]
    messages = conversation(turns, "Be brief.")
    sample = template.sample(tokenizer, messages, ["assistant"])

    def spell(i):
        return tokenizer.piece(i) or tokenizer.token_text(i).encode()

    def text(ids):
        return b"".join(spell(int(i)) for i in ids).decode()

    starts = np.flatnonzero(np.diff(np.pad(sample.weights, (1, 0))) > 0)
    assert len(starts) == len(turns)
    for turn, start in enumerate(starts):
        prompt = template.ids(tokenizer, messages[: 2 + 2 * turn], opened=True)
        assert text(sample.ids[:start]) == text(prompt)
        if way != "plain, BPE":  # there "\n\n" before a name may be one token or two
            assert sample.ids[:start].tolist() == prompt
        end = start + int(np.argmin(np.pad(sample.weights[start:], (0, 1))))
        said = text(sample.ids[start:end])
        ending = {
            True: ("\n\n<|eos|>" if turn + 1 == len(turns) else "\n\nuser:"),
            False: "<|im_end|>\n",
        }[template.plain]
        assert said == (" " if template.plain else "") + turns[turn][1] + ending


def test_weights_of_messages_go_before_those_of_roles():
    messages = conversation([("a", "first"), ("b", "second")])
    messages[1]["weight"], messages[3]["weight"] = 0, -0.5
    sample = ChatTemplate(CHATML).sample(BPE, messages, ["assistant"])
    assert set(sample.weights.tolist()) == {0.0, -0.5}
    assert BPE.decode(sample.ids[sample.weights != 0]) == "second\n"
    asked = ChatTemplate(CHATML).sample(BPE, conversation([("ask", "reply")]), ["user"])
    assert "ask" in BPE.decode(asked.ids[asked.weights > 0]) and "reply" not in BPE.decode(
        asked.ids
    )


@pytest.mark.parametrize("template", [PLAIN, CHATML])
@given(text=st.text("ab é<|im_end|>\n", max_size=30).map("a{}b".format), data=st.data())
@settings(max_examples=40)
def test_spans_of_a_message_are_all_of_it_that_is_trained(template, text, data):
    edges = data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=6).map(sorted))
    spans = [list(span) for span in zip(edges[::2], edges[1::2], strict=False)]
    reply = {"role": "assistant", "content": text, "spans": spans}
    ask = {"role": "user", "content": "ask"}
    sample = ChatTemplate(template).sample(BPE, [ask, reply, ask, reply], ["assistant"])
    kept = BPE.decode(sample.ids[sample.weights > 0])
    wanted = "".join(text[first:last] for first, last in spans)
    assert len(kept) <= 2 * len(wanted)
    if len(BPE.encode(text)) == len(text.encode()):  # a token a byte: all of it
        assert kept == 2 * wanted
    whole = [ask, {**reply, "spans": [[0, len(text)]]}, ask, {**reply, "spans": [[0, len(text)]]}]
    trained = ChatTemplate(template).sample(BPE, whole, ["assistant"])
    assert BPE.decode(trained.ids[trained.weights > 0]) == 2 * text


def test_spans_need_a_template_that_keeps_the_text():
    loud = ChatTemplate("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(ChatError, match="spans"):
        loud.sample(BPE, [{"role": "assistant", "content": "ab", "spans": [[0, 1]]}], ["assistant"])


def test_a_conversation_is_cut_after_the_last_reply_that_fits():
    messages = conversation([("q1", "a1"), ("q2", "a2 " * 40)])
    template, tokenizer = WAYS["plain, bytes"]
    whole = template.sample(tokenizer, messages, ["assistant"])
    cut = template.sample(tokenizer, messages, ["assistant"], limit=len(whole.ids) - 1)
    assert (
        len(cut.ids) < 40 and (cut.ids == whole.ids[: len(cut.ids)]).all() and cut.weights[-1] == 1
    )
    assert template.sample(tokenizer, messages, ["assistant"], limit=10) is None
    assert template.sample(tokenizer, messages[:1], ["assistant"]) is None


def test_a_template_that_rewrites_the_past_is_refused():
    moody = ChatTemplate(
        "{% for m in messages %}{{ m.content if loop.last else '...' }}|{% endfor %}"
    )
    with pytest.raises(ChatError, match="one sample a reply"):
        moody.sample(ByteTokenizer(), conversation([("a", "b"), ("c", "d")]), ["assistant"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 24), max_size=3 * OPEN_ROWS))
def test_whole_packing_keeps_every_sample_in_one_piece(sizes):
    samples = [
        Encoded(np.full(n, i + 5, np.int32), np.arange(n, dtype=np.float32) + i)
        for i, n in enumerate(sizes)
    ]
    rows = list(pack_whole(samples, 24, eos=1))
    found = {}
    for row in rows:
        assert (row["tokens"][row["segment_ids"] == 0] == 1).all() and not row["weights"][
            row["segment_ids"] == 0
        ].any()
        for segment in range(1, row["segment_ids"].max(initial=0) + 1):
            at = np.flatnonzero(row["segment_ids"] == segment)
            assert (np.diff(at) == 1).all()
            found[int(row["tokens"][at[0]]) - 5] = (row["tokens"][at], row["weights"][at])
    assert sorted(found) == list(range(len(sizes)))
    for i, (tokens, weights) in found.items():
        assert (tokens == samples[i].ids).all() and (weights == samples[i].weights).all()


def test_whole_packing_fills_rows():
    rng = np.random.default_rng(0)
    samples = [Encoded(np.ones(n, np.int32)) for n in rng.integers(10, 200, 2000)]
    rows = list(pack_whole(samples, 384, eos=0))
    assert np.mean([row["segment_ids"] > 0 for row in rows]) > 0.97


# ---- from files to rows


@pytest.fixture
def cfg(tmp_path):
    path = tmp_path / "chats.jsonl"
    records = [
        {"messages": conversation([(f"What is {i}?", f"It is {i * i}.")])} for i in range(60)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    cache = str(tmp_path / "cache")
    return DataConfig(
        source="files", format="chat", paths=(str(path),), holdout=0.2, cache_dir=cache
    )


def go(cfg, context=96, **change):
    return prepare(dataclasses.replace(cfg, **change), context, progress=False)


def test_rows_of_conversations_have_weights_and_the_template_travels_along(cfg):
    data = go(cfg)
    rows = [data.train[i] for i in range(len(data.train))]
    assert set(rows[0]) == {"tokens", "segment_ids", "weights"}
    trained = np.concatenate([row["tokens"][row["weights"] > 0] for row in rows])
    assert data.stats["train"]["trained"] == len(trained) and data.stats["train"]["skipped"] == 0
    replies = data.tokenizer.decode(trained).split("\n\n")
    assert all(reply.startswith(" It is ") for reply in replies if reply)
    assert len(replies) - 1 == data.stats["train"]["documents"]
    assert data.template.plain


def test_chatml_tokens_are_added_to_a_tokenizer_that_is_trained_here(cfg):
    data = go(cfg, tokenizer="bpe", bpe_vocab=300, chat_template="chatml")
    assert data.template.source == CHATML and set(CHATML_TOKENS) <= set(data.tokenizer.specials)
    row = data.train[0]
    assert data.tokenizer.specials["<|im_end|>"] in row["tokens"][row["weights"] > 0]
    with pytest.raises(
        DataError, match=r"chatml' needs the special tokens <\|im_start\|> and <\|im_end\|>"
    ):
        go(cfg, chat_template="chatml")


def test_parquet_holds_the_same_conversations(cfg, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    records = [json.loads(line) for line in Path(cfg.paths[0]).read_text().splitlines()]
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "chats.parquet")
    one, other = go(cfg), go(cfg, paths=(str(tmp_path / "chats.parquet"),))

    def of(data):
        return sorted(data.train[i]["tokens"].tobytes() for i in range(len(data.train)))

    assert {len(of(one)), len(of(other))} != {0}
    assert one.stats["train"]["trained"] + one.stats["validation"]["trained"] == (
        other.stats["train"]["trained"] + other.stats["validation"]["trained"]
    )


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": "hello"}, ["line 1", "list of messages"]),
        ({"messages": []}, ["line 1", "list of messages"]),
        ({"messages": ["hello"]}, ["message 0 must be an object"]),
        ({"messages": [{"role": "user"}]}, ["message 0 has no text under 'content'"]),
        (
            {"messages": [{"role": "user", "content": "x", "spans": [[0, 2]]}]},
            ["spans of message 0", "pairs of a first and an end character"],
        ),
        (
            {"messages": [{"role": "user", "content": "x", "weight": "much"}]},
            ["weight of message 0", "finite number"],
        ),
        ({"text": "x"}, ["no field 'messages'", "config.data.text_key"]),
    ],
)
def test_bad_records_are_named(cfg, record, said):
    Path(cfg.paths[0]).write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError) as e:
        go(cfg)
    assert all(part in str(e.value) for part in said), str(e.value)


def test_conversations_too_long_for_a_row_are_counted_and_none_at_all_is_an_error(cfg):
    long = conversation([("x" * 200, "y")])
    with open(cfg.paths[0], "a") as f:
        f.write(
            "".join(
                json.dumps({"messages": [*long, {"role": "user", "content": str(i)}]}) + "\n"
                for i in range(9)
            )
        )
    data = go(cfg)
    assert data.stats["train"]["skipped"] + data.stats["validation"]["skipped"] == 9
    with pytest.raises(DataError, match=r"no conversation of the train split .*row of 8 tokens"):
        go(cfg, context=8)


def test_templates_by_name(tmp_path):
    (tmp_path / "my.jinja").write_text("{{ messages[0].content }}")
    assert (
        build_template(str(tmp_path / "my.jinja"), ByteTokenizer()).source
        == "{{ messages[0].content }}"
    )
    with pytest.raises(DataError, match="neither plain, chatml nor a file"):
        build_template("nowhere.jinja", ByteTokenizer())
