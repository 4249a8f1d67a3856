"""What a training step minimises, beside the losses of the depth policy.

The next token's cross-entropy is one objective; a teacher (`train.distill`) and preferences
(`train.preference`) are others, each with a frozen model beside the state. `step.loss_fn` asks an
objective for its sums and knows none by name.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mor_jax.model.lm import LM
from mor_jax.nn.parameters import Axes, Tree

# tokens, segment_ids: [B, T] int32; of conversations weights: [B, T] float32; under a model that
# draws salt: [B] uint32; where the number of recursions is drawn, steps: [B] int32; of an objective
# with a frozen model taught, see `Objective.teach`; see also step_targets of `train/loops.py`
Batch = dict[str, jax.Array]


class LossInputs(NamedTuple):
    """What an objective reads of the rows that lie on one device."""

    h_BxTxD: jax.Array  # final states of the model
    targets_BxT: jax.Array
    weights_BxT: jax.Array  # of the targets
    segment_ids_BxT: jax.Array
    taught: jax.Array | None  # what `teach` added
    tables: Tree | None  # what `tables` returned


class Sums(NamedTuple):
    """Sums over the targets of some rows."""

    loss: jax.Array
    nll: jax.Array | None  # of next tokens; None: it is the loss
    figures: dict[str, jax.Array]  # metrics by name, divided as the loss is


class Divisors(NamedTuple):
    """What sums of a whole batch are divided by, at least 1 each."""

    loss: jax.Array  # the loss and the figures
    nll: jax.Array


class Objective(Protocol):
    """Stateless but for the weights of a frozen model."""

    @property
    def params(self) -> Any:
        """Weights of the frozen model; None: there is none."""

    @property
    def taught_axes(self) -> Axes | None:
        """Logical axes of what `teach` adds; None: it adds nothing."""

    def with_params(self, params: Any) -> Objective:
        """This objective with these weights of its frozen model."""

    def teach(self, batch: Batch) -> Batch:
        """The batch with what the frozen model says of it as "taught"."""

    def tables(self) -> tuple[Tree | None, Tree | None]:
        """(weights of the frozen model that `sums` reads, their logical axes)."""

    def counted(self, weights_BxT: jax.Array) -> jax.Array:
        """Which targets the nll is of, [B, T] bool."""

    def counts(self, weights_BxT: jax.Array, segment_ids_BxT: jax.Array) -> Divisors:
        """From a whole batch, so that every micro-batch divides by the same."""

    def sums(self, lm: LM, params: Any, rows: LossInputs) -> Sums:
        """Loss, nll and figures; `params` have the whole table of the head (`LM.with_table`)."""

    def flops_per_token(self) -> float:
        """True FLOPs that the frozen model adds to a token."""

    def evaluate(self, lm: LM, params: Any, batches: list[Batch]) -> dict[str, float]:
        """Figures of held-out batches."""


class NextToken:
    """Cross-entropy of the next token; no frozen model."""

    params: Any = None
    taught_axes: Axes | None = None

    def with_params(self, params: Any) -> NextToken:
        return self

    def teach(self, batch: Batch) -> Batch:
        return batch

    def tables(self) -> tuple[Tree | None, Tree | None]:
        return None, None

    def counted(self, weights_BxT: jax.Array) -> jax.Array:
        return weights_BxT != 0

    def counts(self, weights_BxT: jax.Array, segment_ids_BxT: jax.Array) -> Divisors:
        return target_counts(weights_BxT)

    def sums(self, lm: LM, params: Any, rows: LossInputs) -> Sums:
        nll = lm.cross_entropy(params, rows.h_BxTxD, rows.targets_BxT, rows.weights_BxT)
        return Sums(nll, None, {})

    def flops_per_token(self) -> float:
        return 0.0

    def evaluate(self, lm: LM, params: Any, batches: list[Batch]) -> dict[str, float]:
        return {}


class Scales(NamedTuple):
    """What the sums of a whole batch are divided by."""

    targets: Divisors
    candidates_R: jax.Array  # of the router at each step


NEXT_TOKEN: Objective = NextToken()


def target_counts(weights_BxT: jax.Array) -> Divisors:
    """Targets, for both sums. A count, not the sum of the weights, which may cancel (advantages of
    a policy gradient)."""
    count = jnp.maximum(jnp.sum(weights_BxT != 0, dtype=jnp.float32), 1.0)
    return Divisors(count, count)
