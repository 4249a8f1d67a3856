"""Which models the batching engine runs; the others decode plainly (`plain.PlainService`, `generate.Generation`)."""

from __future__ import annotations

from mor_jax.model.lm import LM


def why_not_batched(lm: LM) -> str:
    """What of this model the engine's passes, whose lanes are each at another recursion, do not know; "" if nothing."""
    if lm.model.relaxed:
        return "recursions with something of their own (config.model.norms, lora_rank, recursion_encoding)"
    if lm.depth.policy == "random":
        return "random routing (config.depth.policy)"
    if lm.depth.inference == "auxiliary":
        return "an auxiliary router (config.depth.inference)"
    return ""
