"""The kinds of model that tests go over; plain data, so that tests without JAX do not load it."""

KINDS = {
    "vanilla": ({"sharing": "none", "recursions": 1, "layers": 4}, {}),
    "recursive": ({"sharing": "middle_cycle", "recursions": 3, "layers": 8}, {}),
    "sequence": ({"sharing": "middle_sequence", "recursions": 3, "layers": 8}, {}),
    "mor": ({"sharing": "middle_cycle", "recursions": 3, "layers": 8}, {"policy": "expert_choice"}),
    "token": ({"sharing": "middle_cycle", "recursions": 3, "layers": 8}, {"policy": "token_choice"}),
    "token_every": (
        {"sharing": "cycle", "recursions": 3, "layers": 9, "prelude": 2, "coda": 1},
        {"policy": "token_choice", "gate": "every", "score": "sigmoid", "router": "mlp", "bias_rate": 0.01},
    ),
}
ROUTED = ("mor", "token", "token_every")
