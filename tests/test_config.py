"""What the door refuses, and that every message names the field and a way out; what the configs
under configs/ build."""

import dataclasses
import importlib
import json
import math

import jax
import pytest
from ml_collections import ConfigDict

from mor_jax.analysis import accounting
from mor_jax.config import Config, MeshConfig, from_config_dict, from_dict, mesh_shape
from mor_jax.errors import ConfigError
from mor_jax.model.lm import LM

BASE = {
    "model": {
        "layers": 8,
        "recursions": 3,
        "sharing": "middle_cycle",
        "width": 64,
        "heads": 4,
        "kv_heads": 2,
        "mlp_width": 96,
    },
    "depth": {"policy": "expert_choice"},
    "train": {"steps": 10, "batch_size": 8},
}


def build(devices: int = 1, **overrides) -> Config:
    """BASE with `group__field=value` replaced; a name without "__" is of the top level."""
    raw = {group: dict(fields) for group, fields in BASE.items()}
    for name, value in overrides.items():
        group, _, key = name.partition("__")
        if key:
            raw.setdefault(group, {})[key] = value
        else:
            raw[group] = value
    return from_config_dict(ConfigDict(raw), devices=devices)


# (overrides, what the message must contain)
REFUSED = [
    # names and types
    ({"modle": {}}, ["config.modle", "Did you mean config.model"]),
    ({"model__layrs": 3}, ["config.model.layrs", "Did you mean config.model.layers"]),
    ({"model__batch_size": 3}, ["config.model.batch_size", "Did you mean config.train.batch_size"]),
    ({"train__capacities": (1.0,)}, ["Did you mean config.depth.capacities"]),
    ({"peak_lr": 1e-3}, ["config.peak_lr", "Did you mean config.optim.peak_lr"]),
    ({"optim__zzz": 1}, ["config.optim.zzz does not exist", "peak_lr", "clip_norm"]),
    ({"model": 3}, ["config.model must be a group"]),
    ({"model__layers": "8"}, ["config.model.layers must be int", "str '8'"]),
    ({"model__layers": 8.5}, ["config.model.layers must be int"]),
    ({"model__layers": True}, ["config.model.layers must be int"]),
    ({"optim__peak_lr": "fast"}, ["config.optim.peak_lr must be float"]),
    ({"data__paths": 3}, ["config.data.paths must be a tuple"]),
    ({"depth__capacities": (1.0, "x", 0.5)}, ["config.depth.capacities[1] must be float"]),
    ({"mesh__rules": (("batch",),)}, ["config.mesh.rules[0] must have 2 entries"]),
    # choices
    ({"model__sharing": "middle-cycle"}, ["config.model.sharing", "Did you mean 'middle_cycle'"]),
    ({"model__dtype": "float16"}, ["config.model.dtype", "float32, bfloat16"]),
    ({"model__remat": "full"}, ["config.model.remat", "none, block"]),
    ({"model__attention": "flash"}, ["config.model.attention", "blocked, xla, cudnn"]),
    ({"depth__policy": "expert-choice"}, ["config.depth.policy", "Did you mean 'expert_choice'"]),
    ({"depth__executor": "mask"}, ["config.depth.executor", "Did you mean 'masked'"]),
    ({"data__source": "file"}, ["config.data.source", "Did you mean 'files'"]),
    ({"optim__schedule": "linear"}, ["config.optim.schedule", "wsd, cosine, constant"]),
    # shapes
    ({"model__layers": 9}, ["config.model.layers = 9", "recursions = 3", "5, 8, 11"]),
    ({"model__layers": 2}, ["config.model.layers = 2", "fit: 5, 8"]),
    ({"model__layers": 0}, ["config.model.layers must be positive"]),
    (
        {"model__layers": 8, "model__sharing": "cycle"},
        ["config.model.layers = 8 cannot be cycle", "6, 9"],
    ),
    ({"model__sharing": "none"}, ["config.model.sharing = 'none'", "recursions = 3"]),
    ({"model__kv_heads": 3}, ["config.model.kv_heads = 3", "heads = 4", "1, 2, 4"]),
    ({"model__kv_heads": 8}, ["config.model.kv_heads = 8"]),
    ({"model__width": 66}, ["config.model.width = 66", "heads = 4", "head_dim"]),
    ({"model__width": 20}, ["head dimension is 5", "even"]),
    ({"model__head_dim": 7}, ["head dimension is 7", "even"]),
    ({"model__head_dim": -2}, ["head_dim must not be negative"]),
    ({"model__vocab_size": -1}, ["vocab_size"]),
    ({"model__norm_eps": 0.0}, ["config.model.norm_eps must be positive"]),
    ({"model__init_std": math.nan}, ["config.model.init_std must be positive"]),
    # depth
    (
        {"depth__capacities": (1.0, 0.5)},
        ["config.depth.capacities has 2 entries", "recursions = 3"],
    ),
    ({"depth__capacities": (1.0, 0.5, 0.6)}, ["config.depth.capacities must not increase"]),
    ({"depth__capacities": (1.2, 0.5, 0.5)}, ["config.depth.capacities must lie in (0, 1]"]),
    ({"depth__capacities": (1.0, 0.5, 0.0)}, ["config.depth.capacities must lie in (0, 1]"]),
    ({"depth__capacities": (1.0, math.nan, 0.5)}, ["config.depth.capacities must lie in (0, 1]"]),
    (
        {"depth__policy": "fixed", "depth__capacities": (1.0, 0.6, 0.3)},
        ["config.depth.capacities", "'fixed'"],
    ),
    ({"depth__kv": "full"}, ["config.depth.kv = 'full'", "expert_choice", "Use 'recursion_wise'"]),
    (
        {"depth__kv": "share"},
        ["config.depth.kv must be one of full, recursion_wise", "Did you mean 'shared'"],
    ),
    (
        {"depth__policy": "fixed", "depth__kv": "hybrid"},
        ["config.depth.kv = 'hybrid'", "every token runs", "'shared'"],
    ),
    (
        {"depth__kv": "shared", "depth__capacities": (0.9, 0.5, 0.2)},
        ["config.depth.kv = 'shared'", "starts at 0.9"],
    ),
    (
        {"depth__kv": "hybrid", "depth__capacities": (0.9, 0.5, 0.2)},
        ["config.depth.kv = 'hybrid'", "starts at 0.9"],
    ),
    (
        {"depth__policy": "fixed", "depth__kv": "shared", "model__sharing": "middle_sequence"},
        ["config.depth.kv = 'shared'", "repeats each block in place", "middle_cycle"],
    ),
    (
        {
            "depth__policy": "fixed",
            "depth__kv": "shared",
            "model__sharing": "none",
            "model__recursions": 1,
        },
        ["config.depth.kv = 'shared'", "has one recursion"],
    ),
    ({"depth__policy": "fixed", "depth__kv": "recursion_wise"}, ["config.depth.kv", "Use 'full'"]),
    ({"depth__alpha": -0.1}, ["config.depth.alpha must be a number and not negative"]),
    ({"depth__score": "softmax"}, ["config.depth.score = 'softmax'", "sigmoid", "tanh"]),
    ({"depth__gate": "exit"}, ["config.depth.gate = 'exit'", "multiplicative", "additive"]),
    ({"depth__policy": "fixed", "depth__gate": "exit"}, ["leave it empty"]),
    (
        {"depth__policy": "token_choice", "depth__capacities": (1.0, 0.6, 0.3)},
        ["lets each token choose"],
    ),
    ({"model__sharing": "middle_sequence"}, ["repeats each block in place", "middle_cycle"]),
    ({"depth__router": "mpl"}, ["config.depth.router must be one of", "Did you mean 'mlp'"]),
    ({"model__prelude": -2}, ["-1 leaves them to the sharing scheme"]),
    ({"depth__aux_loss_weight": -0.1}, ["config.depth.aux_loss_weight"]),
    ({"depth__threshold": 1.0}, ["config.depth.threshold", "between 0 and 1"]),
    (
        {"depth__capacities": (1.0, 0.6, 0.3), "depth__policy": "fixed"},
        ["Use policy 'expert_choice' or 'random'"],
    ),
    (
        {"depth__policy": "random", "depth__score": "sigmoid"},
        ["config.depth.score = 'sigmoid'", "nothing is routed"],
    ),
    (
        {"depth__policy": "random", "depth__gate": "multiplicative"},
        ["'random'", "'constant' or 'additive'"],
    ),
    ({"depth__policy": "random", "depth__kv": "full"}, ["config.depth.kv = 'full'", "stops early"]),
    (
        {"depth__policy": "random", "depth__router": "mlp"},
        ["config.depth.router = 'mlp'", "'random' has none"],
    ),
    (
        {"depth__policy": "random", "model__sharing": "middle_sequence"},
        ["repeats each block in place"],
    ),
    (
        {"depth__policy": "fixed", "depth__z_loss_weight": 1e-3},
        ["config.depth.z_loss_weight", "'fixed' has none"],
    ),
    (
        {"depth__inference": "aux"},
        ["config.depth.inference must be one of threshold, auxiliary, calibrated"],
    ),
    (
        {"depth__policy": "token_choice", "depth__inference": "auxiliary"},
        ["decides in training as at inference"],
    ),
    (
        {"depth__policy": "random", "depth__inference": "calibrated"},
        ["config.depth.inference = 'calibrated'", "'random'"],
    ),
    (
        {"depth__inference": "auxiliary", "depth__aux_loss_weight": 0.0},
        ["only the auxiliary loss teaches", "= 0"],
    ),
    ({"depth__aux_lr": 0.0}, ["config.depth.aux_lr must be positive"]),
    (
        {"depth__bias_rate": 0.01},
        ["config.depth.bias_rate = 0.01", "under policy 'expert_choice' capacities do"],
    ),
    ({"depth__warmup": -1}, ["config.depth.warmup counts optimiser steps"]),
    ({"depth__warmup": 10}, ["config.depth.warmup = 10 is the whole run, config.train.steps = 10"]),
    (
        {"depth__warmup": 5, "depth__policy": "fixed"},
        ["config.depth.warmup = 5", "'fixed' routes nothing"],
    ),
    ({"depth__warmup_stages": 0}, ["config.depth.warmup_stages must be at least 1"]),
    ({"depth__tile": 0}, ["config.depth.tile must be at least 1"]),
    ({"depth__tile": 1024}, ["config.depth.tile = 1024", "context = 512"]),
    (
        {"depth__policy": "token_choice", "depth__buckets": 0},
        ["config.depth.buckets must be at least 1"],
    ),
    # relaxation
    ({"model__norms": "separate"}, ["config.model.norms must be one of shared, own"]),
    ({"model__lora_rank": -1}, ["config.model.lora_rank must not be negative"]),
    (
        {"model__lora_rank": 4, "model__recursions": 1, "depth__policy": "fixed"},
        ["config.model.lora_rank = 4", "recursions = 1 shares nothing", "'middle_cycle'"],
    ),
    (
        {
            "model__recursion_encoding": True,
            "model__sharing": "middle_sequence",
            "depth__policy": "fixed",
        },
        ["config.model.recursion_encoding = True", "'middle_sequence' repeats each block in place"],
    ),
    (
        {
            "model__norms": "own",
            "model__sharing": "none",
            "model__recursions": 1,
            "depth__policy": "fixed",
        },
        ["config.model.norms = 'own'", "recursions = 1"],
    ),
    (
        {"model__attention": "cudnn"},
        ["config.model.attention = 'cudnn'", "'float32'", "'bfloat16'"],
    ),
    # data
    ({"data__source": "files"}, ["config.data.paths", "--config.data.paths="]),
    ({"data__source": "tfds"}, ["config.data.name", "config.data.paths"]),
    ({"data__holdout": 0.0}, ["config.data.holdout"]),
    ({"data__holdout": 1.0}, ["config.data.holdout"]),
    ({"data__bpe_vocab": 257}, ["config.data.bpe_vocab = 257", "258"]),
    # optimiser
    ({"optim__peak_lr": 0.0}, ["config.optim.peak_lr must be positive"]),
    ({"optim__peak_lr": math.inf}, ["config.optim.peak_lr must be positive"]),
    ({"optim__b2": 1.0}, ["config.optim.b2"]),
    ({"optim__b1": -0.1}, ["config.optim.b1"]),
    ({"optim__warmup": 1.5}, ["config.optim.warmup is a share"]),
    ({"optim__final_lr": -0.5}, ["config.optim.final_lr is a share"]),
    ({"optim__warmup": 0.6, "optim__decay": 0.6}, ["warmup 0.6", "decay 0.6"]),
    ({"optim__clip_norm": -1.0}, ["clip_norm"]),
    ({"optim__weight_decay": -1.0}, ["weight_decay"]),
    # run
    ({"train__steps": 0}, ["give steps, or flops", "steps = 0, flops = 0"]),
    ({"train__steps": -1, "train__flops": 1e12}, ["give steps, or flops"]),
    ({"train__accum": 3}, ["config.train.batch_size = 8", "accum = 3", "6, 9"]),
    ({"train__accum": 16}, ["config.train.batch_size = 8", "accum = 16", "nearest that can: 16"]),
    ({"train__accum": 0}, ["config.train.accum must be positive"]),
    ({"train__batch_size": 0}, ["config.train.batch_size must be positive"]),
    ({"train__log_every": 0}, ["config.train.log_every must be positive"]),
    ({"train__keep_checkpoints": 0}, ["config.train.keep_checkpoints must be positive"]),
    ({"train__eval_every": -1}, ["eval_every"]),
    ({"data__seed": -1}, ["seeds must not be negative"]),
    # mesh
    ({"devices": 3}, ["rows a micro-batch", "data x fsdp = 3", "6, 9"]),
    (
        {"devices": 8, "train__accum": 2},
        ["rows a micro-batch", "= 8", "batch sizes near it that can: 16"],
    ),
    (
        {"devices": 8, "mesh__data": 2, "mesh__fsdp": 2},
        ["2 x 2 x 1 x 1 = 4", "there are 8 devices"],
    ),
    ({"devices": 8, "mesh__fsdp": 3}, ["8 devices cannot be divided", "product 3"]),
    ({"devices": 8, "mesh__fsdp": -1}, ["at most one of them -1"]),
    ({"mesh__data": 0}, ["axes must be positive"]),
    ({"mesh__data": -2}, ["axes must be positive"]),
    (
        {"devices": 8, "mesh__fsdp": 8, "model__width": 60, "model__head_dim": 16},
        ["config.model.width = 60", "config.mesh.fsdp = 8"],
    ),
    ({"devices": 4, "mesh__tensor": 4}, ["config.model.kv_heads = 2", "config.mesh.tensor = 4"]),
    (
        {"devices": 2, "mesh__tensor": 2, "model__mlp_width": 97},
        ["config.model.mlp_width = 97", "tensor = 2"],
    ),
    (
        {"devices": 2, "mesh__tensor": 2, "model__vocab_size": 97},
        ["config.model.vocab_size = 97", "tensor = 2"],
    ),
]


@pytest.mark.parametrize(
    ("overrides", "parts"), REFUSED, ids=lambda v: str(v)[:60] if isinstance(v, dict) else ""
)
def test_refused(overrides, parts):
    with pytest.raises(ConfigError) as error:
        build(**overrides)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layers", range(1, 40))
@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle"])
def test_layer_counts_offered_are_accepted(layers, sharing):
    for recursions in (1, 2, 3, 4):
        values = {
            "model__layers": layers,
            "model__sharing": sharing,
            "model__recursions": recursions,
        }
        try:
            build(**values)
        except ConfigError as e:
            for offered in str(e).split("fit: ")[1].rstrip(".").split(", "):
                build(**values | {"model__layers": int(offered)})


def test_base_builds_and_coercions():
    cfg = build(
        optim__peak_lr=1, model__layers=8.0, data__paths="a.txt", depth__capacities=[1, 0.5, 0.5]
    )
    assert (cfg.optim.peak_lr, cfg.model.layers) == (1.0, 8) and type(cfg.optim.peak_lr) is float
    assert cfg.data.paths == ("a.txt",) and cfg.depth.capacities == (1.0, 0.5, 0.5)
    assert type(cfg.model.layers) is int and hash(cfg.model) == hash(build().model)


def test_round_trip_through_json():
    cfg = build(
        mesh__rules=(("mlp", "tensor+fsdp"),),
        depth__capacities=(1.0, 0.5, 0.25),
        data__paths=("a", "é"),
    )
    assert from_dict(cfg.to_dict()) == cfg
    assert from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_every_default_is_a_config_of_its_type():
    """Defaults pass their own type checks: nothing changes type on the first save and load."""
    cfg = Config()
    again = from_dict(json.loads(json.dumps(cfg.to_dict())))
    for group in dataclasses.fields(cfg):
        assert getattr(again, group.name) == getattr(cfg, group.name)


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        ((-1, 1, 1), 8, (8, 1, 1, 1)),
        ((2, -1, 2), 8, (2, 2, 1, 2)),
        ((1, 1, 1), 1, (1, 1, 1, 1)),
        ((-1, 1, 2, 2), 8, (2, 1, 2, 2)),
    ],  # data, fsdp, tensor, sequence as configured; data, fsdp, sequence, tensor in device order
)
def test_mesh_shape(sizes, devices, shape):
    assert mesh_shape(MeshConfig(*sizes), devices) == shape


# ---------------------------------------------------------------- configs/


def config_of(name: str, arg: str | None = None) -> Config:
    module = importlib.import_module(f"configs.{name}")
    return from_config_dict(module.get_config(arg) if arg is not None else module.get_config())


def initialised(cfg: Config) -> dict[str, int]:
    """Parameters of the tree `LM.init` makes: all, those of the embedding, those of the router."""
    shapes = jax.eval_shape(LM.from_config(cfg).init, jax.random.key(0))
    shapes["router"].pop("survey", None)  # statistics, not parameters

    def count(tree):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    return {
        "total": count(shapes),
        "embedding": count(shapes["embed"]),
        "router": count(shapes["router"]),
    }


PAPER = [
    *(("vanilla", size, 1) for size in ("135m", "360m", "730m", "1.7b")),
    *(
        (n, size, nr)
        for n in ("recursive", "mor")
        for size in ("135m", "360m", "730m", "1.7b")
        for nr in (1, 2, 3, 4)
    ),
]


@pytest.mark.parametrize(("name", "size", "nr"), PAPER)
def test_paper_configs_build_and_are_counted_right(name, size, nr):
    cfg = config_of(name, size if name == "vanilla" else f"{size},nr={nr}")
    found, counted = initialised(cfg), accounting.parameters(cfg.model, cfg.depth)
    assert found["total"] == counted.total
    assert found["embedding"] == counted.embedding == 49152 * cfg.model.width
    assert found["router"] == counted.router == (nr * cfg.model.width if name == "mor" else 0)
    assert cfg.model.recursions == nr and size in cfg.name


# Unique non-embedding parameters, in millions (table 6 and table 3 of the paper), without the
# router.
PUBLISHED = [
    ("vanilla", "360m", 1, 314.6),
    ("recursive", "360m", 2, 167.2),
    ("recursive", "360m", 3, 118.0),
    ("recursive", "360m", 4, 98.3),
    ("mor", "360m", 2, 167.2),
    ("mor", "360m", 3, 118.0),
    ("mor", "360m", 4, 98.3),
    ("vanilla", "135m", 1, 106),
    ("mor", "135m", 3, 42),
    ("mor", "730m", 3, 252),
    ("mor", "1.7b", 3, 670),
    ("vanilla", "730m", 1, 654),
    ("vanilla", "1.7b", 1, 1610),
]


@pytest.mark.parametrize(("name", "size", "nr", "millions"), PUBLISHED)
def test_paper_sizes(name, size, nr, millions):
    found = initialised(config_of(name, size if name == "vanilla" else f"{size},nr={nr}"))
    mine = (found["total"] - found["embedding"] - found["router"]) / 1e6
    digits = (
        1 if isinstance(millions, float) else -1 if millions >= 600 and millions % 10 == 0 else 0
    )
    assert round(mine, digits) == millions


def test_defaults_of_the_paper_configs():
    assert config_of("mor").to_dict() == config_of("mor", "360m,nr=3").to_dict()
    assert config_of("mor", "nr=3,size=360m") == config_of("mor")
    assert config_of("mor").depth.kv_name == "recursion_wise"
    assert (
        config_of("mor", "kv=shared").depth.kv == "shared"
        and config_of("mor", "kv=shared").name == "mor-360m-r3-shared"
    )
    assert config_of("mor", "policy=token,kv=hybrid").name == "mor-360m-r3-token-hybrid"
    assert config_of("recursive", "135m").model.recursions == 3
    assert config_of("vanilla").model.layers == 32


@pytest.mark.parametrize(("size", "millions"), [("tiny", 0.4), ("small", 2.4)])
def test_native_configs_build_at_the_size_they_say(size, millions):
    model, twin = (config_of("native_rlm", f"{size},vanilla={v}") for v in (0, 1))
    assert twin.model.recursions == 1 and twin.model.layers == model.model.layers == 5
    assert model.data.format == "chat" and model.data.prompt_variant == "native"
    sized = dataclasses.replace(model, model=dataclasses.replace(model.model, vocab_size=768))
    assert round(initialised(sized)["total"] / 1e6, 1) == millions


def test_quickstart_kinds_share_text_batch_and_budget():
    kinds = {kind: config_of("quickstart", kind) for kind in ("mor", "vanilla", "recursive")}
    assert config_of("quickstart") == kinds["mor"]
    for kind, cfg in kinds.items():
        assert cfg.name == kind
        assert cfg.data == kinds["mor"].data and cfg.optim == kinds["mor"].optim
        assert (
            cfg.train.batch_size == kinds["mor"].train.batch_size
            and cfg.train.flops == kinds["mor"].train.flops
        )
        sized = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=2048))
        assert initialised(sized)["total"] == accounting.parameters(sized.model, sized.depth).total
    assert kinds["mor"].depth.policy == "expert_choice"
    assert kinds["vanilla"].model.recursions == 1 and kinds["recursive"].depth.policy == "fixed"


@pytest.mark.parametrize(
    ("name", "arg", "parts"),
    [
        ("mor", "370m", ["370m", "360m"]),
        ("mor", "360m,nr=three", ["nr=three", "whole number"]),
        ("mor", "360m,n=3", ["'n=3'", "nr=3"]),
        ("mor", "360m,nr=0", ["nr = 0"]),
        ("mor", "360m,kv=share", ["kv 'share'", "shared"]),
        ("vanilla", "360m,nr=3", ["'nr=3'", "size=360m"]),
        ("quickstart", "vanila", ["'vanila'", "vanilla"]),
        ("quickstart", "kind=mor,steps=3", ["'steps=3'"]),
    ],
)
def test_bad_config_arguments(name, arg, parts):
    with pytest.raises(ConfigError) as error:
        config_of(name, arg)
    for part in parts:
        assert part in str(error.value)
