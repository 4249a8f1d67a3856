"""A recursive model from an unshared one: index tables written by hand, and what must hold whatever
the table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm

from mor_jax.config import DepthConfig, ModelConfig
from mor_jax.errors import ConfigError
from mor_jax.model.convert import METHODS, convert, default_method, source_table
from mor_jax.model.lm import LM

# scheme, target layers, recursions: of a source of 8 layers, what each block is made of
TABLES = {
    ("cycle", 8, 2): {
        "stepwise": ([], [[0], [2], [5], [7]], []),
        "average": ([], [[0, 4], [1, 5], [2, 6], [3, 7]], []),
        "lower": ([], [[0], [1], [2], [3]], []),
        "upper": ([], [[4], [5], [6], [7]], []),
    },
    ("sequence", 8, 2): {
        "stepwise": ([], [[0], [2], [5], [7]], []),
        "average": ([], [[0, 1], [2, 3], [4, 5], [6, 7]], []),
        "lower": ([], [[0], [1], [2], [3]], []),
        "upper": ([], [[4], [5], [6], [7]], []),
    },
    ("middle_cycle", 8, 3): {
        "stepwise": ([[0]], [[1], [6]], [[7]]),
        "average": ([[0]], [[1, 3, 5], [2, 4, 6]], [[7]]),
        "lower": ([[0]], [[1], [2]], [[7]]),
        "upper": ([[0]], [[5], [6]], [[7]]),
    },
    ("middle_sequence", 8, 3): {
        "stepwise": ([[0]], [[1], [6]], [[7]]),
        "average": ([[0]], [[1, 2, 3], [4, 5, 6]], [[7]]),
        "lower": ([[0]], [[1], [2]], [[7]]),
        "upper": ([[0]], [[5], [6]], [[7]]),
    },
}
SOURCE = ModelConfig(layers=8)


def target(sharing, layers, recursions, **more):
    return ModelConfig(layers=layers, sharing=sharing, recursions=recursions, **more)


def plain(table):
    return tuple([list(pick) for pick in table[part]] for part in ("prelude", "core", "coda"))


@pytest.mark.parametrize("method", ["stepwise", "average", "lower", "upper"])
@pytest.mark.parametrize("scheme", TABLES, ids=lambda s: s[0])
def test_tables_by_hand(scheme, method):
    assert plain(source_table(SOURCE, target(*scheme), method)) == TABLES[scheme][method]


def test_a_random_draw_is_in_order_without_repetition_and_a_function_of_the_seed():
    to = target("middle_cycle", 11, 3)
    draws = {
        seed: plain(source_table(ModelConfig(layers=20), to, "random", seed=seed))
        for seed in range(8)
    }
    for first, core, last in draws.values():
        picked = [i for [i] in core]
        assert first == [[0]] and last == [[19]]
        assert (
            picked == sorted(set(picked))
            and len(picked) == 3
            and picked[0] >= 1
            and picked[-1] <= 18
        )
    assert plain(source_table(ModelConfig(layers=20), to, "random", seed=3)) == draws[3]
    assert len({str(d) for d in draws.values()}) > 1


def test_a_source_of_another_length_is_cut_the_same_way():
    """The paper's 135M has 30 layers, its recursive twin 32: 28 inner layers for 10 shared
    blocks."""
    to = target("middle_sequence", 32, 3)
    _, core, last = plain(source_table(ModelConfig(layers=30), to, "average"))
    assert [i for pick in core for i in pick] == list(range(1, 29)) and last == [[29]]
    assert {len(pick) for pick in core} == {2, 3}
    _, core, _ = plain(
        source_table(ModelConfig(layers=30), target("middle_cycle", 32, 3), "average")
    )
    assert core[0] == [1, 11, 21] and core[9] == [10, 20]
    assert plain(source_table(ModelConfig(layers=30), to, "stepwise"))[1][0::9] == [[1], [28]]
    ends = target("cycle", 9, 3, prelude=2, coda=1)
    assert plain(source_table(SOURCE, ends, "lower")) == ([[0], [1]], [[2], [3]], [[7]])


def test_stepwise_rounds_as_the_released_code_does():
    """32 layers, R = 3: `round(linspace(1, 30, 10))`."""
    core = plain(source_table(ModelConfig(layers=32), target("middle_cycle", 32, 3), "stepwise"))[1]
    assert [i for [i] in core] == [1, 4, 7, 11, 14, 17, 20, 24, 27, 30]
    # Half way between two layers the even one is taken, counted from the first layer of the source.
    core = plain(source_table(ModelConfig(layers=6), target("middle_cycle", 11, 3), "stepwise"))[1]
    assert [i for [i] in core] == [1, 2, 4]


def test_one_block_takes_the_first_of_a_stepwise_choice():
    assert plain(source_table(SOURCE, target("cycle", 4, 4), "stepwise"))[1] == [[0]]


@pytest.mark.parametrize("method", METHODS)
def test_unshared_to_itself_is_exact(method):
    lm = small_lm("vanilla")
    params = random_params(lm)
    made = convert(params, lm.model, lm.model, method)
    assert jax.tree.structure(made | {"router": params["router"]}) == jax.tree.structure(params)
    for old, new in zip(
        jax.tree.leaves(params), jax.tree.leaves(made | {"router": params["router"]}), strict=True
    ):
        assert old is new


def test_blocks_move_from_the_core_to_the_ends_of_the_same_function():
    """Unshared in other clothes (its first and last layer called prelude and coda): another tree,
    the same logits."""
    lm = small_lm("vanilla")
    params = random_params(lm)
    to = dataclasses.replace(lm, model=dataclasses.replace(lm.model, sharing="middle_cycle"))
    made = convert(params, lm.model, to.model, "stepwise") | {"router": {}}
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    assert sorted(made["core"]) == ["0", "1"]
    np.testing.assert_array_equal(lm.apply(params, tokens), to.apply(made, tokens))
    back = convert(made, to.model, lm.model, "average")
    jax.tree.map(np.testing.assert_array_equal, back, {k: params[k] for k in back})


@pytest.mark.parametrize("scheme", TABLES, ids=lambda s: s[0])
def test_values_are_those_of_the_table_and_fit_the_model(scheme):
    lm = small_lm("vanilla", layers=8)
    params = random_params(lm)
    depth = DepthConfig() if "sequence" in scheme[0] else DepthConfig(policy="expert_choice")
    to = LM(
        dataclasses.replace(lm.model, sharing=scheme[0], layers=scheme[1], recursions=scheme[2]),
        depth,
    )
    expected = jax.eval_shape(to.init, jax.random.key(0))
    for method, (_, core, _) in TABLES[scheme].items():
        made = convert(params, lm.model, to.model, method)
        jax.tree.map(
            lambda a, b: np.testing.assert_equal(a.shape, b.shape),
            made,
            {k: expected[k] for k in made},
        )
        for i, pick in enumerate(core):
            mean = np.mean(
                [np.asarray(params["core"][str(j)]["mlp"]["down"], np.float64) for j in pick],
                axis=0,
            )
            np.testing.assert_allclose(
                made["core"][str(i)]["mlp"]["down"], mean, rtol=1e-5, atol=1e-7
            )
        assert made["embed"] is params["embed"] and made["norm"] is params["norm"]


def test_what_does_not_fit_is_named():
    to = target("middle_cycle", 8, 3)
    with pytest.raises(ConfigError, match=r"no method 'middle'.*stepwise"):
        source_table(SOURCE, to, "middle")
    with pytest.raises(ConfigError, match=r"3 layers.*4 blocks.*at least 4"):
        source_table(ModelConfig(layers=3), to, "lower")
    with pytest.raises(ConfigError, match=r"keep.*1 \+ 2 \+ 1 there.*0 \+ 8 \+ 0 here"):
        source_table(to, SOURCE, "keep")
    with pytest.raises(ConfigError, match=r"width 256 there, 128 here.*head_dim 64 there, 32 here"):
        convert({}, SOURCE, target("cycle", 8, 2, width=128), "lower")
    with pytest.raises(ConfigError, match="vocab_size 64 there, 128 here"):
        convert(
            {}, ModelConfig(layers=8, vocab_size=64), target("cycle", 8, 2, vocab_size=128), "lower"
        )
    with pytest.raises(ConfigError, match="rope_theta"):
        convert({}, SOURCE, target("cycle", 8, 2, rope_theta=5e5), "lower")


def test_a_recursive_source_unrolls_or_keeps_its_core():
    """More recursions of one core, a router on it, and the unshared model of the same function."""
    lm = small_lm("recursive", layers=6, recursions=2, sharing="middle_cycle")
    params, tokens = random_params(lm), jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    assert default_method(lm.model) == "keep" and default_method(SOURCE) == "stepwise"
    more = LM(
        dataclasses.replace(lm.model, layers=8, recursions=3), DepthConfig(policy="expert_choice")
    )
    made = convert(params, lm.model, more.model, "keep")
    expected = jax.eval_shape(more.init, jax.random.key(0))
    assert jax.tree.structure(made) == jax.tree.structure({name: expected[name] for name in made})
    assert all(
        made["core"][i]["mlp"]["down"] is params["core"][i]["mlp"]["down"] for i in ("0", "1")
    )
    plain_lm = LM(dataclasses.replace(lm.model, recursions=1, sharing="none"))
    flat = convert(params, lm.model, plain_lm.model, "stepwise") | {"router": {}}
    np.testing.assert_allclose(plain_lm.apply(flat, tokens), lm.apply(params, tokens), atol=1e-5)


def test_what_recursions_have_of_their_own_is_kept_or_refused():
    lm = small_lm("recursive", layers=4, recursions=2, sharing="cycle", norms="own", lora_rank=2)
    params, tokens = random_params(lm), jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    same = convert(params, lm.model, lm.model, "keep") | {"router": params["router"]}
    np.testing.assert_array_equal(lm.apply(same, tokens), lm.apply(params, tokens))
    more = LM(dataclasses.replace(lm.model, layers=8, recursions=4), lm.depth)
    own = convert(params, lm.model, more.model, "keep")["core"]["1"]["own"]["norm_1"]["scale"]
    assert own.shape == (4, 32)
    np.testing.assert_array_equal(
        own[2:], np.stack([params["core"]["1"]["own"]["norm_1"]["scale"][1]] * 2)
    )
    for to, method in ((dataclasses.replace(lm.model, lora_rank=0), "keep"), (lm.model, "average")):
        with pytest.raises(ConfigError, match=r"of their own.*only method 'keep'"):
            convert(params, lm.model, to, method)
