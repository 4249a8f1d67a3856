"""Distillation: a run also learns what a teacher, another checkpoint, predicts (`config.distill`).

The teacher's weights lie on the mesh by the run's rules, beside the state and outside of it: a
checkpoint of the run does not hold them. Each micro-batch passes through the teacher once, as it
generates (causal depths); its final states travel with the batch, and its logits exist a chunk at a
time (`model.loss.distilled_sum`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax

from mor_jax.analysis import accounting
from mor_jax.config import Config, ModelConfig, check
from mor_jax.data.vocabulary import Tokenizer
from mor_jax.errors import CheckpointError, ConfigError
from mor_jax.model import block as network
from mor_jax.model.lm import CAUSAL, LM, STATES
from mor_jax.model.loss import Finish, Mix, distilled_sum
from mor_jax.nn.parameters import Axes, Tree
from mor_jax.train.load import load_model
from mor_jax.train.objective import Batch, Divisors, LossInputs, Sums, target_counts

COMPUTED_ALIKE = (
    "context",
    "dtype",
    "attention",
    "loss_chunk",
    "scan_layers",
)  # fields of the run's model


class Teacher(NamedTuple):
    """A model to learn from; see `train.objective.Objective`."""

    lm: LM
    params: Any
    weight: float = 0.5  # of the distillation loss; the next-token loss has the rest
    temperature: float = 1.0

    @property
    def taught_axes(self) -> Axes:
        return STATES

    def with_params(self, params: Any) -> Teacher:
        return self._replace(params=params)

    def teach(self, batch: Batch) -> Batch:
        """The batch with the teacher's final states as "taught", [B, T, E]."""
        out = self.lm.forward(self.params, batch["tokens"], batch["segment_ids"], mode=CAUSAL)
        return batch | {"taught": jax.lax.stop_gradient(out.h_BxTxD)}

    def tables(self) -> tuple[Tree, Tree]:
        """(parameters of embedding and head, their logical axes): what its logits need beside the
        states."""
        axes = self.lm.logical_axes()

        def pick(tree: Tree) -> Tree:
            return {name: tree[name] for name in ("embed", "head") if name in tree}

        return pick(self.params), pick(axes)

    def counted(self, weights_BxT: jax.Array) -> jax.Array:
        return weights_BxT != 0

    def counts(self, weights_BxT: jax.Array, segment_ids_BxT: jax.Array) -> Divisors:
        return target_counts(weights_BxT)

    def sums(self, lm: LM, params: Any, rows: LossInputs) -> Sums:
        """The mixed loss, the nll, and the distillation loss; see `model.loss.distilled_sum`."""
        assert rows.taught is not None and rows.tables is not None, "of `teach` and `tables`"

        def finish(model: ModelConfig) -> Finish:
            return functools.partial(network.finish, model)

        table = network.head_table(lm.with_table(params))
        own_table = network.head_table(self.lm.with_table(rows.tables))
        models = finish(lm.model), finish(self.lm.model)
        mix = Mix(self.weight, self.temperature, lm.model.loss_chunk, *models)
        learned, nll, distillation = distilled_sum(
            rows.h_BxTxD, table, rows.targets_BxT, rows.weights_BxT, rows.taught, own_table, mix
        )
        return Sums(learned, nll, {"distill_loss": distillation})

    def flops_per_token(self) -> float:
        """True FLOPs of its forward pass."""
        lm = self.lm
        return accounting.true_flops_per_token(lm.model, lm.depth, recursion=lm.recursion).total

    def evaluate(self, lm: LM, params: Any, batches: list[Batch]) -> dict[str, float]:
        return {}


def load_teacher(
    cfg: Config, tokenizer: Tokenizer, lm: LM, mesh: jax.sharding.Mesh
) -> Teacher | None:
    """The teacher of a run, its weights placed by the rules of `lm`; None: the run has none.

    Raises:
      CheckpointError: the checkpoint cannot be read, or its model cannot teach this one.
    """
    d = cfg.distill
    if not d.weight:
        return None
    loaded = load_model(d.teacher, mesh=mesh)
    where, model = f"config.distill.teacher = {d.teacher!r}", loaded.lm.model
    if tokenizer.fingerprint() != loaded.tokenizer.fingerprint():
        raise CheckpointError(
            f"{where} was trained with another tokenizer than {cfg.data.tokenizer!r}: its predictions are of other tokens. "
            "Use a teacher with the same tokenizer, or its tokenizer.json as config.data.tokenizer."
        )
    if model.vocab_size != cfg.model.vocab_size:
        raise CheckpointError(
            f"{where} has a table of {model.vocab_size} tokens, the run one of {cfg.model.vocab_size}. Set "
            f"config.model.vocab_size = {model.vocab_size}."
        )
    if model.context < cfg.model.context:
        raise CheckpointError(
            f"{where} reads {model.context} tokens at most, the rows have {cfg.model.context}. Use "
            f"config.model.context = {model.context}, or another teacher."
        )
    # How it is computed is the run's choice; what it computes is its own.
    ours = {name: getattr(cfg.model, name) for name in COMPUTED_ALIKE}
    model = dataclasses.replace(model, remat="none", **ours)
    try:
        check(dataclasses.replace(cfg, model=model, depth=loaded.lm.depth), devices=mesh.size)
    except ConfigError as e:
        raise CheckpointError(f"{where} cannot be run in this configuration: {e}") from e
    teacher = LM(model, loaded.lm.depth, lm.rules)
    params = jax.device_put(loaded.params, lm.rules.shardings(mesh, teacher.logical_axes()))
    return Teacher(teacher, params, d.weight, d.temperature)
