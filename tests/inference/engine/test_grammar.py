"""Whatever a model would rather say, constrained output parses and validates; and the masks leave
what is right alone."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import random_params, small_lm

from mor_jax.data.tokenizer import ByteTokenizer, train_bpe
from mor_jax.errors import UserError
from mor_jax.inference.decode import decode_step, prefill
from mor_jax.inference.engine.drawing import draw
from mor_jax.inference.engine.grammar import LONGEST, GrammarBroken, Grammars
from mor_jax.inference.engine.request import Drawing
from mor_jax.inference.engine.rows import (
    DrawConfig,
    empty_rows,
    host_row,
    put_mask,
    put_row,
    waiting,
)

LANES, CONTEXT = 8, 192
BYTES = ByteTokenizer()
BPE = train_bpe(
    ['{"name": "a cat", "age": 12, "tags": ["x", "yes", true, null]} the cat said no, '] * 50, 330
)
LM = small_lm("mor", vocab_size=384, context=CONTEXT)
PARAMS = random_params(LM)

_prefill = jax.jit(prefill, static_argnums=(0, 4))
_step = jax.jit(decode_step, static_argnums=0, donate_argnums=2)
_draw = jax.jit(draw, static_argnums=4)
_put_row, _put_mask = jax.jit(put_row), jax.jit(put_mask)


def generate(tokenizer, grammars, drawing):
    """Texts of lanes that each keep to their grammar, and whether each came to its end within the
    context."""
    config = DrawConfig(tokenizer.vocab_size)
    rows = empty_rows(LANES, config)
    for lane, grammar in enumerate(grammars):
        row = host_row(
            Drawing(**drawing, seed=lane), config, prompt=[tokenizer.bos], grammar=grammar
        )
        rows = _put_row(rows, lane, row)
    logits, cache, _ = _prefill(
        LM, PARAMS, jnp.full((LANES, 1), tokenizer.bos), jnp.ones(LANES, jnp.int32), CONTEXT, None
    )
    out = [[] for _ in grammars]
    for position in range(1, CONTEXT):
        at = jnp.full((LANES,), position, jnp.int32)
        running = np.array([not g.finished for g in grammars] + [False] * (LANES - len(grammars)))
        if not running.any():
            break
        assert not (np.asarray(waiting(rows, at)) & running).any()
        drawn, rows = _draw(logits, rows, at, running, config)
        tokens = np.asarray(drawn.token_N)
        for lane in np.flatnonzero(running):
            grammars[lane].advance(int(tokens[lane]))
            out[lane].append(int(tokens[lane]))
            if not grammars[lane].finished:
                rows = _put_mask(rows, int(lane), grammars[lane].allowed(), position + 1)
        logits, cache, _ = _step(LM, PARAMS, cache, jnp.maximum(drawn.token_N, 0), None)
    return [tokenizer.decode(tokens) for tokens in out], [g.finished for g in grammars]


names = st.text('abcé"\\ {', min_size=1, max_size=4)
leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": "integer"}),
    st.just({"type": "number"}),
    st.tuples(st.integers(-50, 50), st.integers(0, 200)).map(
        lambda t: {"type": "integer", "minimum": t[0], "maximum": t[0] + t[1]}
    ),
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(
        lambda t: {"type": "string", "minLength": t[0], "maxLength": t[0] + t[1]}
    ),
    st.just({"type": "string", "pattern": "^[a-c]{2,5}$"}),
    st.just({"type": "string", "format": "date"}),
    st.lists(st.one_of(names, st.integers(-9, 9), st.none()), min_size=1, max_size=3).map(
        lambda v: {"enum": v}
    ),
    names.map(lambda v: {"const": v}),
)


def deeper(inner):
    array = st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
        lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[1] + t[2]}
    )
    thing = st.dictionaries(names, inner, max_size=3).flatmap(
        lambda properties: st.sets(
            st.sampled_from(sorted(properties)) if properties else st.nothing()
        ).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required),
                "additionalProperties": False,
            }
        )
    )
    return st.one_of(
        array, thing, st.lists(inner, min_size=1, max_size=2).map(lambda v: {"anyOf": v})
    )


schemas = st.recursive(leaves, deeper, max_leaves=5)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_random_schemas_are_obeyed_by_a_random_model(tokenizer):
    grammars, ended = Grammars(tokenizer), []

    @settings(max_examples=4)
    @given(st.lists(schemas, min_size=LANES, max_size=LANES), st.sampled_from([0.7, 1.0, 3.0]))
    def run(batch, temperature):
        texts, done = generate(
            tokenizer, [grammars.json_schema(s) for s in batch], {"temperature": temperature}
        )
        for schema, text, complete in zip(batch, texts, done, strict=True):
            if complete:
                jsonschema.validate(json.loads(text), schema)
        ended.extend(done)

    run()
    assert np.mean(ended) > 0.9  # a number may go on and on


def test_objects_patterns_and_choices():
    grammars = Grammars(BYTES)
    options = ["yes", "no", 'say "no"\\n\n', "né", "y"]
    texts, done = generate(
        BYTES,
        [
            grammars.choice(options),
            grammars.choice(options),
            grammars.choice(["no"]),
            grammars.regex("(ab|c){3}[0-9]{2}"),
            grammars.regex("[^a]é?"),
            grammars.json_object(),
        ],
        {"temperature": 2.0, "top_p": 0.95},
    )
    assert all(done[:5])
    assert set(texts[:2]) <= set(options) and texts[2] == "no"
    assert re.fullmatch("(ab|c){3}[0-9]{2}", texts[3]) and re.fullmatch("[^a]é?", texts[4])
    assert texts[5].startswith("{") and (not done[5] or isinstance(json.loads(texts[5]), dict))


def spell(grammar, tokenizer, text):
    for token in tokenizer.encode(text):
        mask = grammar.allowed()
        assert mask[token // 32] >> (token % 32) & 1, (
            f"{tokenizer.token_text(token)!r} of {text!r} is forbidden"
        )
        grammar.advance(token)
    return grammar


# The library has a model escape DEL in strings, which JSON leaves open.
strings = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=12)


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text("ab", min_size=1, max_size=3), st.integers() | strings | st.booleans(), max_size=4
    )
)
def test_valid_json_is_not_forbidden(value):
    for tokenizer in (BYTES, BPE):
        grammar = spell(
            MADE[tokenizer].json_object(), tokenizer, json.dumps(value, ensure_ascii=False)
        )
        assert grammar.finished
        mask = grammar.allowed()  # nothing but the end
        assert [i for i in range(len(mask) * 32) if mask[i // 32] >> (i % 32) & 1] == [
            tokenizer.eos
        ]


MADE = {tokenizer: Grammars(tokenizer) for tokenizer in (BYTES, BPE)}


def test_the_end_may_come_where_the_text_could_go_on():
    grammar = spell(MADE[BYTES].choice(["yes", "yesterday"]), BYTES, "yes")
    assert not grammar.finished and grammar.allowed()[BYTES.eos // 32] >> (BYTES.eos % 32) & 1
    grammar.advance(BYTES.eos)
    assert grammar.finished
    with pytest.raises(GrammarBroken, match="after the end"):
        grammar.advance(ord("t"))


def test_a_forbidden_token_breaks_one_request_and_no_other():
    first, other = MADE[BYTES].choice(["yes"]), MADE[BYTES].choice(["yes"])
    with pytest.raises(GrammarBroken):
        first.advance(ord("n"))
    assert spell(other, BYTES, "yes").finished
    with pytest.raises(GrammarBroken):
        MADE[BYTES].choice(["yes"]).advance(BYTES.eos)


def test_masks_have_the_size_of_the_vocabulary_asked_for():
    wide = Grammars(BYTES, vocab_size=384).choice(["a"])
    assert wide.allowed().shape == (12,) and wide.allowed().dtype == np.uint32
    assert [int(w) for w in wide.allowed()] == [0, 0, 0, 1 << 1, *[0] * 8]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda g: g.json_schema('{"type":'), "not valid JSON.*line 1"),
        (lambda g: g.json_schema("[1]"), "must be an object"),
        (lambda g: g.json_schema({"type": "strin"}), "Invalid type: strin"),
        (lambda g: g.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda g: g.json_schema({"$ref": "#/nowhere"}), "nowhere"),
        (lambda g: g.json_schema({"type": "string", "pattern": "a(?=b)"}), "look-around"),
        (lambda g: g.json_schema({"enum": []}), "Unsatisfiable"),
        (lambda g: g.json_schema('{"a":' * 5000 + "1" + "}" * 5000), "JSON schema"),
        (lambda g: g.json_schema({"title": "x" * LONGEST}), "at most"),
        (lambda g: g.json_schema({"title": {1, 2}}), "cannot be written as JSON"),
        (lambda g: g.regex("(a"), "unclosed group"),
        (lambda g: g.regex(r"(a)\1"), "backreferences"),
        (lambda g: g.regex("\ud800"), "UTF-8"),
        (lambda g: g.choice([]), "at least one"),
        (lambda g: g.choice(["a", ""]), "at least one"),
    ],
)
def test_what_cannot_be_compiled_says_why(make, reason):
    with pytest.raises(UserError, match=reason):
        make(MADE[BYTES])


def test_without_the_library_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match="pip install llguidance"):
        Grammars(BYTES)
