"""The arithmetic must equal the paper's published numbers and an independent brute-force count."""

import math

import pytest

from mor_jax.analysis import accounting
from mor_jax.analysis.accounting import peak_flops
from mor_jax.analysis.traffic import decode_traffic
from mor_jax.config import Config, DepthConfig, ModelConfig, TrainConfig
from mor_jax.errors import ConfigError

FIXED = DepthConfig(policy="fixed")
ROUTED = DepthConfig(policy="expert_choice")
SHARED = DepthConfig(policy="expert_choice", kv="shared")
HYBRID = DepthConfig(policy="expert_choice", kv="hybrid")
# MoR spec section 6.1
SIZES = {
    "135M": dict(layers=30, width=576, heads=9, kv_heads=3, mlp_width=1536),
    "360M": dict(layers=32, width=960, heads=15, kv_heads=5, mlp_width=2560),
    "730M": dict(layers=26, width=1536, heads=24, kv_heads=8, mlp_width=4096),
    "1.7B": dict(layers=24, width=2048, heads=32, kv_heads=32, mlp_width=8192),
}


def paper_model(size, recursions=1, layers=None):
    shape = dict(SIZES[size], vocab_size=49152, context=2048, recursions=recursions)
    shape["sharing"] = "middle_cycle" if recursions > 1 else "none"
    return ModelConfig(**shape | ({"layers": layers} if layers else {}))


def paper_config(size, depth, recursions=1, layers=None):
    train = TrainConfig(flops=16.5e18, batch_size=1024)
    return Config(model=paper_model(size, recursions, layers), depth=depth, train=train)


@pytest.mark.parametrize(
    ("size", "recursions", "layers", "millions", "digits"),
    [
        ("135M", 1, None, 106, 0),
        ("135M", 3, 32, 42, 0),
        ("360M", 1, None, 315, 0),
        ("360M", 2, None, 167.2, 1),
        ("360M", 3, None, 118.0, 1),
        ("360M", 4, 34, 98.3, 1),
        ("730M", 1, None, 654, 0),
        ("730M", 3, None, 252, 0),
        ("1.7B", 1, None, 1610, -1),
        ("1.7B", 2, None, 870, -1),
        ("1.7B", 3, 26, 670, -1),
    ],
)
def test_unique_parameters_equal_the_paper(size, recursions, layers, millions, digits):
    count = accounting.parameters(paper_model(size, recursions, layers), FIXED)
    assert round(count.non_embedding / 1e6, digits) == pytest.approx(
        millions, abs=10.0**-digits * 0.51
    )


@pytest.mark.parametrize(
    ("size", "millions"), [("135M", 28), ("360M", 47), ("730M", 75), ("1.7B", 101)]
)
def test_tied_embedding_counts_once(size, millions):
    count = accounting.parameters(paper_model(size), FIXED)
    assert round(count.embedding / 1e6) == millions
    assert count.total == count.embedding + count.non_embedding == count.to_dict()["total"]


def test_routing_adds_one_vector_a_recursion():
    model = paper_model("360M", 3)
    plain, routed = accounting.parameters(model, FIXED), accounting.parameters(model, ROUTED)
    assert routed.router == routed.total - plain.total == 3 * 960


def test_unresolved_vocabulary_is_named():
    with pytest.raises(ConfigError, match="vocab_size"):
        accounting.parameters(ModelConfig(), FIXED)


def test_capacities_default_to_a_staircase():
    assert ROUTED.shares(paper_model("360M", 4, 34)) == (1.0, 0.75, 0.5, 0.25)
    assert FIXED.shares(paper_model("360M", 4, 34)) == (1.0,) * 4
    mine = DepthConfig(policy="expert_choice", capacities=(1.0, 0.5, 0.1))
    assert mine.shares(paper_model("360M", 3)) == (1.0, 0.5, 0.1)
    assert accounting.active_counts(paper_model("360M", 3), ROUTED) == (2048, 1365, 682)


@pytest.mark.parametrize(
    ("depth", "recursions", "layers", "mflops", "steps"),
    [
        (FIXED, 1, 32, 833.7, 9438),
        (FIXED, 2, 32, 833.7, 9438),
        (FIXED, 3, 32, 833.7, 9438),
        (FIXED, 4, 34, 885.8, 8883),
        (ROUTED, 2, 32, 623.5, 12619),
        (ROUTED, 3, 32, 555.7, 14161),
        (ROUTED, 4, 34, 553.5, 14216),
        (SHARED, 3, 32, 536.3, 14672),
    ],
)
def test_paper_flops_and_steps_of_360m(depth, recursions, layers, mflops, steps):
    """MoR spec sections 6.3 and 6.4: the released step counts at 16.5e18 FLOPs."""
    cfg = paper_config("360M", depth, recursions, layers)
    assert accounting.paper_flops_per_token(cfg.model, cfg.depth) / 1e6 == pytest.approx(
        mflops, rel=1e-3
    )
    assert accounting.steps_for_flops(cfg) == pytest.approx(steps, rel=1e-3)
    assert accounting.paper_training_flops(cfg, steps) == pytest.approx(16.5e18, rel=1e-3)


def test_shared_keys_of_a_recursive_transformer_cost_less():
    """Two of its three applications project no keys: 8 D² FLOPs less in each of the 10 layers of
    the core."""
    model = paper_model("360M", 3)
    full, shared = (
        accounting.paper_flops_per_token(model, d) for d in (FIXED, DepthConfig(kv="shared"))
    )
    assert full - shared == pytest.approx(2 * 10 * 4 * 960**2)


def test_steps_of_135m():
    assert accounting.training_steps(paper_config("135M", ROUTED, 3, 32)) == pytest.approx(
        36326, rel=1e-3
    )


def test_explicit_steps_win():
    assert accounting.training_steps(Config(train=TrainConfig(steps=7))) == 7
    with pytest.raises(ConfigError, match="flops"):
        accounting.steps_for_flops(Config(train=TrainConfig(steps=7)))


@pytest.mark.parametrize("depth", [ROUTED, SHARED, HYBRID], ids=lambda depth: depth.kv_name)
@pytest.mark.parametrize("sharing", ["middle_cycle", "cycle"])
def test_true_flops_equal_a_brute_force_count(sharing, depth):
    """Walk every layer, token and query-key pair of a small model and add up multiply-adds times
    two."""
    layers = 8 if sharing == "middle_cycle" else 6
    model = ModelConfig(
        layers=layers,
        recursions=3,
        sharing=sharing,
        width=12,
        heads=4,
        kv_heads=2,
        head_dim=4,
        mlp_width=20,
        vocab_size=33,
        context=7,
    )
    d, n, k, h, f, v, t = 12, 4, 2, 4, 20, 33, 7
    active = [t, math.floor(2 / 3 * t), math.floor(1 / 3 * t)]
    # (tokens, recursion step) of every layer; 0 outside of the recursion
    runs = [
        *([(t, 0)] if sharing == "middle_cycle" else []),
        *[(a, r + 1) for r, a in enumerate(active) for _ in "ab"],
        *([(t, 0)] if sharing == "middle_cycle" else []),
    ]
    assert len(runs) == layers
    blocks = attention = 0
    for tokens, r in runs:
        makes_keys = depth is not SHARED or r < 2
        # half of the row, on average over evenly spread tokens
        sees_all = depth is not ROUTED and r > 1
        for i in range(tokens):
            blocks += 2 * (d * n * h + (2 * d * k * h if makes_keys else 0) + n * h * d + 3 * d * f)
            attention += n * (2 * h + 2 * h) * ((t + 1) / 2 if sees_all else i + 1)
    router = sum(2 * d for pool in [t, *active[:-1]] for _ in range(pool))

    flops = accounting.true_flops_per_token(model, depth)
    assert flops.blocks * t == pytest.approx(blocks)
    assert flops.attention * t == pytest.approx(attention)
    assert flops.router * t == pytest.approx(router)
    assert flops.head == 2 * d * v
    assert flops.training == pytest.approx(3 * (blocks + attention + router + t * 2 * d * v) / t)


def test_true_flops_of_measured_counts():
    model = paper_model("360M", 3)
    default = accounting.true_flops_per_token(model, ROUTED)
    assert accounting.true_flops_per_token(model, ROUTED, mean_counts=(2048, 1365, 682)) == default
    assert (
        accounting.true_flops_per_token(model, ROUTED, mean_counts=(2048, 2048, 2048)).blocks
        > default.blocks
    )
    # prelude and coda
    assert accounting.true_flops_per_token(model, ROUTED, mean_counts=(0, 0, 0)).blocks > 0
    with pytest.raises(ConfigError, match="mean_counts"):
        accounting.true_flops_per_token(model, ROUTED, mean_counts=(1, 2))


def test_a_recursive_model_costs_what_it_unrolls_to():
    vanilla = accounting.true_flops_per_token(paper_model("360M"), FIXED)
    assert accounting.true_flops_per_token(paper_model("360M", 3), FIXED) == vanilla
    # Training a 360M vanilla model: about 3x the paper's forward budget plus the head (MoR spec
    # section 6.4).
    ratio = vanilla.training / accounting.paper_flops_per_token(paper_model("360M"), FIXED)
    assert 3.0 < ratio < 3.5


@pytest.mark.parametrize("recursions", [2, 3, 4])
def test_kv_ratio_of_the_core(recursions):
    """MoR spec section 4: (R + 1) / 2R of a model that stores every token at every depth."""
    model = ModelConfig(layers=12, recursions=recursions, sharing="cycle", vocab_size=64)
    ratio = accounting.kv_bytes_per_token(model, ROUTED) / accounting.kv_bytes_per_token(
        model, FIXED
    )
    assert ratio == pytest.approx((recursions + 1) / (2 * recursions))


@pytest.mark.parametrize(
    ("depth", "stored", "read"),
    [
        (FIXED, 1, 1),
        (ROUTED, 4 / 6, 4 / 6),
        (SHARED, 1 / 3, 1),
        (HYBRID, 1, 1),
        (DepthConfig(kv="shared"), 1 / 3, 1),
        (DepthConfig(policy="token_choice", kv="shared"), 1 / 3, 1),
    ],
)
def test_kv_stored_and_read(depth, stored, read):
    """MoR spec section 4, R = 3: memory (R + 1) / 2R against 1 / R, IO (R + 1) / 2R against 1."""
    model = ModelConfig(layers=12, recursions=3, sharing="cycle", vocab_size=64)
    full = accounting.kv_bytes_per_token(model, FIXED)
    assert accounting.kv_bytes_per_token(model, depth) == pytest.approx(stored * full)
    assert decode_traffic(model, depth, 100).read_full_depth == pytest.approx(100 * read * full)


def test_kv_bytes():
    model = ModelConfig(
        layers=8, recursions=3, sharing="middle_cycle", kv_heads=2, head_dim=4, vocab_size=64
    )
    assert accounting.kv_bytes_per_token(model, FIXED) == 2 * 2 * 4 * 4 * 8
    assert accounting.kv_bytes_per_token(model, ROUTED) == pytest.approx(
        2 * 2 * 4 * 4 * (2 + 2 * 2)
    )
    measured = accounting.kv_bytes_per_token(
        model, ROUTED, mean_active=(0.5, 0.25, 0.0), bytes_per_value=2
    )
    assert measured == pytest.approx(2 * 2 * 4 * 2 * (2 + 2 * 0.75))
    with pytest.raises(ConfigError, match="mean_active"):
        accounting.kv_bytes_per_token(model, ROUTED, mean_active=(1.0,))


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 156e12),
        ("TPU v4", "bfloat16", 275e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5p", "bfloat16", 459e12),
        ("TPU v6e", "bfloat16", 918e12),
        ("NVIDIA RTX A1000", "bfloat16", None),
        ("cpu", "float32", None),
        ("NVIDIA H100 80GB HBM3", "float64", None),
    ],
)
def test_peak_flops(kind, dtype, peak):
    assert peak_flops(kind, dtype) == peak
