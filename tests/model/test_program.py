"""The sharing schemes: which weights each layer of the unrolled network uses (paper, table 1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params

from mor_jax.config import ModelConfig, from_config_dict
from mor_jax.errors import ConfigError
from mor_jax.model.lm import LM
from mor_jax.model.program import build_program

# Weights of layer l = 0.. of 8 or 9 layers with two or three recursions, as the paper writes them.
TABLE = {
    ("cycle", 9, 3): "012 012 012",
    ("sequence", 9, 3): "000 111 222",
    ("middle_cycle", 8, 3): "a 01 01 01 z",
    ("middle_sequence", 8, 3): "a 000 111 z",
    ("cycle", 8, 2): "0123 0123",
    ("sequence", 8, 2): "00 11 22 33",
    ("none", 5, 1): "01234",
}


def shape(sharing: str, layers: int, recursions: int, **more) -> ModelConfig:
    return ModelConfig(
        sharing=sharing,
        layers=layers,
        recursions=recursions,
        width=16,
        heads=2,
        kv_heads=1,
        mlp_width=24,
        vocab_size=32,
        init_std=0.3,
        **more,
    )


def written_out(params: dict, order: str) -> list[dict]:
    """Weights of each layer: a, b.. the prelude's, z, y.. the coda's, digits the core's."""
    part = {c: params["prelude"][str(i)] for i, c in enumerate("ab") if str(i) in params["prelude"]}
    part |= {c: params["coda"][str(i)] for i, c in enumerate("zy") if str(i) in params["coda"]}
    part |= {k: v for k, v in params["core"].items()}
    return [part[c] for c in order.replace(" ", "")]


def plain_twin(params: dict, layers: list[dict]) -> tuple[LM, dict]:
    """An unshared model with the weights written out layer by layer."""
    lm = LM(shape("none", len(layers), 1))
    core = {str(i): w for i, w in enumerate(layers)}
    return lm, params | {"prelude": {}, "core": core, "coda": {}}


def check_order(lm: LM, order: str) -> None:
    params = random_params(lm)
    twin, twin_params = plain_twin(params, written_out(params, order))
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 32)
    got, want = jax.jit(lm.apply)(params, tokens), jax.jit(twin.apply)(twin_params, tokens)
    # the same sums, fused differently
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(
    ("scheme", "order"), TABLE.items(), ids=lambda v: "-".join(map(str, v)) if v else ""
)
def test_layers_use_the_weights_the_paper_says(scheme, order):
    lm = LM(shape(*scheme))
    assert lm.program.unrolled_layers == scheme[1]
    assert lm.program.unique_layers == len(set(order.replace(" ", "")))
    check_order(lm, order)


def test_any_number_of_own_blocks_around_the_core():
    check_order(LM(shape("cycle", 7, 2, prelude=2, coda=1)), "ab 01 01 z")
    check_order(LM(shape("middle_sequence", 6, 2, prelude=0, coda=2)), "00 11 zy")


def test_the_other_order_is_another_model():
    """The comparison bites: written out in the other scheme's order, the numbers differ."""
    with pytest.raises(AssertionError):
        check_order(LM(shape("cycle", 9, 3)), TABLE["sequence", 9, 3])


@pytest.mark.parametrize("scheme", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
def test_layer_counts_that_do_not_divide_are_refused_with_those_that_do(scheme):
    model = {
        "sharing": scheme,
        "layers": 12 if scheme.startswith("middle") else 10,
        "recursions": 3,
    }
    with pytest.raises(ConfigError, match=r"that fit: .*(11|9)") as e:
        from_config_dict({"model": model, "train": {"steps": 1}})
    for count in map(int, str(e.value).split("that fit: ")[1].rstrip(".").split(", ")):
        build_program(ModelConfig(sharing=scheme, layers=count, recursions=3))
        from_config_dict({"model": model | {"layers": count}, "train": {"steps": 1}})
