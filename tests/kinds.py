"""The kinds of model that tests go over; plain data, so that tests without JAX do not load it."""

KINDS = {
    "vanilla": ({"sharing": "none", "recursions": 1, "layers": 4}, {}),
    "recursive": ({"sharing": "middle_cycle", "recursions": 3, "layers": 8}, {}),
    "sequence": ({"sharing": "middle_sequence", "recursions": 3, "layers": 8}, {}),
    "mor": ({"sharing": "middle_cycle", "recursions": 3, "layers": 8}, {"policy": "expert_choice"}),
    "token": (
        {"sharing": "middle_cycle", "recursions": 3, "layers": 8},
        {"policy": "token_choice"},
    ),
    "token_every": (
        {"sharing": "cycle", "recursions": 3, "layers": 9, "prelude": 2, "coda": 1},
        {
            "policy": "token_choice",
            "gate": "every",
            "score": "sigmoid",
            "router": "mlp",
            "bias_rate": 0.01,
        },
    ),
    "recursive_shared": (
        {"sharing": "middle_cycle", "recursions": 3, "layers": 8},
        {"kv": "shared"},
    ),
    "mor_shared": (
        {"sharing": "middle_cycle", "recursions": 3, "layers": 8},
        {"policy": "expert_choice", "kv": "shared"},
    ),
    "token_hybrid": (
        {"sharing": "cycle", "recursions": 3, "layers": 6},
        {"policy": "token_choice", "kv": "hybrid"},
    ),
}
# Others, for tests that go over all policies and KV strategies.
MORE_KV = {
    "mor_hybrid": (
        {"sharing": "middle_cycle", "recursions": 3, "layers": 8},
        {"policy": "expert_choice", "kv": "hybrid"},
    ),
    "mor_hybrid_first": (
        {"sharing": "cycle", "recursions": 3, "layers": 6},
        {"policy": "expert_choice", "kv": "hybrid_first"},
    ),
    "random_shared": (
        {"sharing": "cycle", "recursions": 3, "layers": 6},
        {"policy": "random", "kv": "shared"},
    ),
    "mor_relaxed": (
        {
            "sharing": "middle_cycle",
            "recursions": 3,
            "layers": 8,
            "norms": "own",
            "lora_rank": 2,
            "recursion_encoding": True,
        },
        {"policy": "expert_choice", "kv": "hybrid", "inference": "auxiliary"},
    ),
    "token_shared": (
        {"sharing": "cycle", "recursions": 3, "layers": 6},
        {"policy": "token_choice", "kv": "shared"},
    ),
}
# Features of the block and the head, each a case of tests/model/test_block.py, and all at once in
# the engine.
FEATURES = {
    "none": {},
    "logit_cap": {"logit_cap": 3.0},
    "untied": {"tied": False},
    "qkv_bias": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True},
    "linear": {"rope_scaling": "linear", "rope_factor": 4.0},
    "llama3": {
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_original_context": 96,
        "rope_theta": 500.0,
    },
    "yarn": {
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
        "rope_original_context": 64,
        "rope_beta_fast": 4.0,
    },
}
ALL_FEATURES = {
    field: value
    for name in ("logit_cap", "untied", "qkv_bias", "qk_norm", "yarn")
    for field, value in FEATURES[name].items()
} | {"smear": 3}
ROUTED = tuple(
    kind
    for kind, (_, depth) in (KINDS | MORE_KV).items()
    if depth.get("policy", "fixed") != "fixed"
)
