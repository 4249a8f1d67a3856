"""The language model: embed -> prelude -> (depth policy, core) x R -> coda -> norm, head.

`LM` is a frozen dataclass of configuration with pure functions of parameters: hashable, so it can
be a static argument. Parameters are a plain nested dict:

    embed/table [V, D], embed/smear [S, D] with `model.smear` ·
    prelude|core|coda/<i>/{attention,mlp,norm_1,norm_2} · router/... · norm/scale [D] · head/table
    [V, D], unless it is tied to the embedding's
    · recursion/..., if a step has parameters beside the core's

Recursion shares `core` by construction: it exists once. A relaxed one has, beside what is shared,
core/<i>/own with a leading axis R: what each recursion has of its own (`model.norms`,
`model.lora_rank`, `model.recursion_encoding`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mor_jax import nn
from mor_jax.config import Config, DepthConfig, ModelConfig, RecursionConfig, unshared_ends
from mor_jax.config.recursion import check_recursion
from mor_jax.errors import UserError
from mor_jax.model import block as network
from mor_jax.model.block import Attend, EachBlock, Rope, Step
from mor_jax.model.depth import (
    Controlled,
    DepthControl,
    DepthPolicy,
    RouterStats,
    TokenInfo,
    build_policy,
)
from mor_jax.model.kv import HYBRID, KeyValue, Past, attend_past, looks_back
from mor_jax.model.loss import cross_entropy_sum, token_nll
from mor_jax.model.program import Program, build_program
from mor_jax.model.recurse import (
    Core,
    Recursed,
    depths_at_once,
    fitting_profile,
    run_gathered,
    run_masked,
)
from mor_jax.model.recursion.exit import Exiting, Reader, hashed
from mor_jax.model.recursion.loop import Loop
from mor_jax.model.recursion.unroll import Unrolled, run_to_rest, run_unrolled
from mor_jax.model.stack import Stack, in_loop, run_stack, stacked
from mor_jax.nn.parameters import Axes, Tree
from mor_jax.nn.rope import rope_table
from mor_jax.parallel.mesh import backend
from mor_jax.parallel.rows import (
    forget_gathered,
    gather_weight,
    join_rows,
    manual_axes,
    over_rows,
    own_part,
)
from mor_jax.parallel.rules import Rules

# selection over the row (training), or by each token's own score (inference)
TOPK, CAUSAL = "topk", "causal"

# Logical axes of what a pass over rows takes and gives.
ROW, STATES = ("batch", "time"), ("batch", "time", None)
CONTROL = DepthControl._make([("batch", None), ("batch",), ("batch",)])

REMAT_POLICIES = {
    "block": None,  # keep block inputs only
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Forward(NamedTuple):
    """Final normalised states and what the recursion did."""

    h_BxTxD: jax.Array
    depth_BxT: jax.Array
    stats: RouterStats
    active_RxBxT: jax.Array


def positions_in_document(segment_ids_BxT: jax.Array) -> jax.Array:
    """Position of each token since the start of its packing segment, [B, T] int32."""
    index = jnp.arange(segment_ids_BxT.shape[1], dtype=jnp.int32)[None]
    starts = jnp.pad(
        segment_ids_BxT[:, 1:] != segment_ids_BxT[:, :-1], ((0, 0), (1, 0)), constant_values=True
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _positions(seg_BxT: jax.Array) -> jax.Array:
    """`positions_in_document` of rows that may be cut along time."""
    return own_part(positions_in_document(join_rows(seg_BxT)))


@dataclass(frozen=True)
class LM:
    """A recursive-depth language model of this shape, with this depth policy, under these sharding
    rules."""

    model: ModelConfig
    depth: DepthConfig = field(default_factory=DepthConfig)
    rules: Rules = field(default_factory=Rules)
    # of training (`depth/warmup.py`, `depth/vary.py`); None: warm, at the configured shares
    stage: int | None = None
    recursion: RecursionConfig = field(default_factory=RecursionConfig)

    @classmethod
    def from_config(cls, cfg: Config) -> LM:
        """The model of a run; `cfg.model.vocab_size` must be resolved (not 0)."""
        return cls(cfg.model, cfg.depth, Rules.create(cfg.mesh.rules), recursion=cfg.recursion)

    def at_depth(self, recursions: int) -> LM:
        """This model at so many recursions, fewer or more than it was trained with, for the same
        parameters.

        Raises:
          UserError: a routed model, a core that is not applied as a whole, or steps for which
            nothing was learned.
        """
        m, trained = self.model, self.model.recursions
        if recursions < 1:
            raise UserError(
                f"a model applies its core at least once; {recursions} recursions were asked for."
            )
        if recursions == trained:
            return self
        if self.depth.routed or m.sharing not in ("cycle", "middle_cycle"):
            raise UserError(
                "only a model of depth policy 'fixed' with sharing 'cycle' or 'middle_cycle' runs at another number of "
                f"recursions; this one has policy {self.depth.policy!r} and sharing {m.sharing!r}."
            )
        own = m.relaxed or (
            self.recursion.conditioning == "learned" and self.recursion.beyond == "refuse"
        )
        if own and recursions > trained:
            raise UserError(
                f"each of the {trained} recursions of this model has parameters of its own, so there is nothing for "
                f"recursion {trained + 1}. Ask for at most {trained} (learned conditioning: or set "
                "config.recursion.beyond)."
            )
        if recursions % (self.recursion.inner + 1):
            raise UserError(
                f"this model updates its answer every {self.recursion.inner + 1} recursions (config.recursion.inner); "
                f"{recursions} would end within a round."
            )
        prelude, coda = unshared_ends(m)
        model = dataclasses.replace(
            m,
            recursions=recursions,
            layers=prelude + self.program.core * recursions + coda,
            prelude=prelude,
            coda=coda,
        )
        least = min(self.recursion.exit_least, recursions)
        return dataclasses.replace(
            self, model=model, recursion=dataclasses.replace(self.recursion, exit_least=least)
        )

    def with_exit(self, rule: str, threshold: float, least: int = 1) -> LM:
        """This model with another rule for when a token stops at inference, for the same
        parameters.

        Args:
          rule: a word of `config.recursion.exit`; "fixed": none.
          threshold: below which the rule stops a token ("cdf": from which on).
          least: recursions that every token runs.
        Raises:
          ConfigError: the rule cannot act in this model, with the reason.
        """
        recursion = dataclasses.replace(
            self.recursion, exit=rule, exit_threshold=threshold, exit_least=least
        )
        check_recursion(recursion, self.model, self.depth)
        return dataclasses.replace(self, recursion=recursion)

    @functools.cached_property
    def loop(self) -> Loop:
        """What a recursion step does beside the core."""
        return Loop(self.recursion, self.model)

    @property
    def numbered(self) -> bool:
        """Whether the core must be told which step it is applied for."""
        return self.model.relaxed or self.recursion.reads or self.program.networks > 1

    @property
    def draws(self) -> bool:
        """Whether training gives each row a salt."""
        return self.policy.draws or self.recursion.state == "random"

    def kv(self, mode: str = "causal") -> str:
        """The KV strategy of a pass. Tokens stop early in causal mode alone; their keys are then
        the newest they have, or none."""
        if mode != CAUSAL or not self.recursion.exits:
            return self.depth.kv_name
        return HYBRID if self.recursion.missing == "latest" else "recursion_wise"

    @functools.cached_property
    def program(self) -> Program:
        return build_program(self.model)

    @functools.cached_property
    def policy(self) -> DepthPolicy:
        return build_policy(self.model, self.depth, self.stage)

    def steered(
        self,
        control: DepthControl | None,
        params: Tree | None = None,
        hash_BxT: jax.Array | None = None,
    ) -> DepthPolicy:
        """The policy of causal inference: with the exit rule, if the model has one, which reads
        `params` and the hashes of `seen`, and under `control`, if it is given."""
        policy = self.policy
        if self.recursion.exits and params is not None:
            whole = self.with_table(params)

            def logits(h: jax.Array) -> jax.Array:
                return self.logits(whole, self.final_norm(whole, h))

            def gate(h: jax.Array) -> jax.Array:
                return self.loop.gate(params["recursion"], h)

            reader = Reader(logits, gate, hash_BxT)
            policy = Exiting(self.program.recursions, self.recursion, reader)
        return policy if control is None else Controlled(policy, control)

    def seen(
        self, ids_BxT: jax.Array, pos_BxT: jax.Array, before_B: jax.Array | None = None
    ) -> jax.Array | None:
        """What an exit rule that draws is told of each token, `recursion.exit.hashed`; None: no
        such rule."""
        return hashed(ids_BxT, pos_BxT, before_B) if self.recursion.exit == "draw" else None

    def _leaves(self) -> dict[str, Any]:
        """The modules that own the parameters, by the name of their subtree; those of a block as
        "block"."""
        m = self.model
        table = nn.Table(m.vocab_size, m.width, m.init_std)
        leaves = {
            "embed": dataclasses.replace(table, smear=m.smear),
            "norm": nn.Scale(m.width),
            "block": nn.Block(m),
        }
        return leaves if m.tied else leaves | {"head": table}

    def _parts(self) -> dict[str, int]:
        return {
            "prelude": self.program.prelude,
            "core": self.program.core * self.program.networks,
            "coda": self.program.coda,
        }

    # ---------------------------------------------------------------- parameters

    def init(self, key: jax.Array) -> Tree:
        """Float32 parameters. Run it under `jax.jit` with `out_shardings` so that they never exist
        unsharded."""
        leaves = self._leaves()
        embed_key, block_key, router_key, norm_key = jax.random.split(key, 4)
        params = {
            "embed": nn.init(leaves["embed"], embed_key),
            "norm": nn.init(leaves["norm"], norm_key),
            "router": self.policy.init(router_key),
        }
        if "head" in leaves:
            params["head"] = nn.init(leaves["head"], jax.random.fold_in(embed_key, 1))
        # One initialiser for all blocks, mapped over their keys: it compiles once, not once a
        # layer.
        keys = jax.random.split(block_key, self.program.unique_layers)
        stacked = jax.vmap(lambda key: nn.init(leaves["block"], key))(keys)
        first = 0
        for part, count in self._parts().items():
            params[part] = {
                str(i): jax.tree.map(lambda w, n=first + i: w[n], stacked) for i in range(count)
            }
            first += count
        if beside := self.loop.init(jax.random.fold_in(block_key, 2)):
            params["recursion"] = beside
        if self.model.relaxed:
            keys = jax.random.split(jax.random.fold_in(block_key, 1), self.program.core)
            params["core"] = {
                i: self._relax(w, self._own(int(i), keys[int(i)]))
                for i, w in params["core"].items()
            }
        return params

    def _own(self, block: int, key: jax.Array | None = None) -> Tree:
        """What each recursion has of its own in one block of the core, leaves [R, ...]; without a
        key, the logical axes of it."""
        m, steps = self.model, self.program.recursions
        scale = {
            "scale": ("recursion", "norm")
            if key is None
            else jnp.ones((steps, m.width), jnp.float32)
        }
        own = {"norm_1": scale, "norm_2": scale} if m.norms == "own" else {}
        if m.recursion_encoding and block == 0:
            own["encoding"] = scale  # of the state the core reads
        if m.lora_rank and key is None:
            names = nn.logical_axes(nn.Lora(m))
            own["lora"] = {name: ("recursion", *axes) for name, axes in names.items()}
        elif m.lora_rank and key is not None:
            own["lora"] = jax.vmap(lambda key: nn.init(nn.Lora(m), key))(
                jax.random.split(key, steps)
            )
        return own

    def _relax(self, shared: Tree, own: Tree) -> Tree:
        """A block of the core with what recursions have of their own, and without what that
        replaces."""
        kept = {
            name: leaf
            for name, leaf in shared.items()
            if self.model.norms == "shared" or "norm" not in name
        }
        return kept | ({"own": own} if own else {})

    def logical_axes(self) -> Tree:
        """Tree like `init`'s, each leaf a tuple of logical axis names."""
        axes = {name: nn.logical_axes(module) for name, module in self._leaves().items()}
        block = axes.pop("block")
        axes["router"] = self.policy.logical_axes()
        if beside := self.loop.logical_axes():
            axes["recursion"] = beside
        axes |= {part: {str(i): block for i in range(n)} for part, n in self._parts().items()}
        if self.model.relaxed:
            axes["core"] = {
                i: self._relax(names, self._own(int(i))) for i, names in axes["core"].items()
            }
        return axes

    # ---------------------------------------------------------------- building blocks of every pass

    def rope(self, pos: jax.Array) -> Rope:
        """Rotary tables for these positions, [B, T] or [M]."""
        return rope_table(self.model, pos)

    def block(
        self,
        params: Tree,
        x_BxTxD: jax.Array,
        rope: Rope,
        attend: Attend,
        *,
        queries_only: bool = False,
        step: Step = None,
        gather: bool = False,
        looped: bool = False,
    ) -> tuple[jax.Array, Any]:
        """One block (`model.block.block`), rematerialised as configured. `gather`: its weights may
        be cut over the devices of the rows. `looped`: it is the body of a loop, which keeps forward
        and backward pass apart by itself."""
        gather = gather and self._cut()

        # the step stays outside: it may be a number, which chooses a part at no cost
        def run(p: Tree, x: jax.Array, r: Rope) -> tuple[jax.Array, Any]:
            p = self._gathered_block(p) if gather else p
            return network.block(self.model, p, x, r, attend, step=step, queries_only=queries_only)

        remat = self.model.remat
        if remat == "none" and not gather:
            return run(params, x_BxTxD, rope)
        # A gathered weight that is used once is not kept for the backward pass: all of them are the
        # whole model.
        policy = REMAT_POLICIES.get(remat, forget_gathered)
        return jax.checkpoint(run, policy=policy, prevent_cse=not looped)(params, x_BxTxD, rope)

    def _cut(self) -> bool:
        """Whether matrices of a block lie cut over the devices of the rows here. Where they do not
        (data parallelism alone), a block needs no checkpoint to forget the whole ones, and keeps
        fewer copies without."""
        return not manual_axes().isdisjoint(self.rules.axes("embed"))

    def _gathered_block(self, params: Tree) -> Tree:
        """The weights of one block, whole over the axes of the rows, matrices in the compute
        dtype."""
        axes = nn.logical_axes(self._leaves()["block"])

        def dtype(w: jax.Array) -> Any:
            return self.model.dtype if w.ndim > 1 else w.dtype

        return jax.tree.map(
            lambda w, names: gather_weight(self.rules, w, names, dtype(w)), params, axes
        )

    def blocks(
        self,
        params: Tree | Stack,
        x_BxTxD: jax.Array,
        rope: Rope,
        attend: Attend | EachBlock | Sequence[Attend],
        repeat: int = 1,
        queries_only: bool = False,
        recursion: Step = None,
        gather: bool = False,
    ) -> tuple[jax.Array, list[Any]]:
        """All blocks of one part in order, see `model.block.blocks` and, of stacked ones,
        `model.stack.run_stack`.

        `recursion`: index from 0 of the step the core is applied for, of the batch or [B] of each
        row; a relaxed core must be told."""
        looped = isinstance(params, Stack)

        def one(p: Tree, x: jax.Array, attend: Attend) -> tuple[jax.Array, Any]:
            return self.block(
                p,
                x,
                rope,
                attend,
                queries_only=queries_only,
                step=recursion,
                gather=gather,
                looped=looped,
            )

        if isinstance(params, Stack):
            assert not isinstance(attend, Sequence), "one of each block is for unrolled ones"
            return run_stack(one, params, x_BxTxD, attend, repeat)
        if self.program.networks > 1 and recursion is not None:
            params = self._network(params, recursion)
        return network.blocks(one, params, x_BxTxD, attend, repeat)

    def _network(self, core: Tree, step: jax.Array | int) -> Tree:
        """Of several cores, the blocks of the one that this step applies."""
        c, count = self.program.core, self.program.networks
        which = self.loop.updates_y(step) if self.recursion.inner else step % count
        each = [[core[str(n * c + i)] for n in range(count)] for i in range(c)]
        if isinstance(step, int):
            return {str(i): networks[int(which)] for i, networks in enumerate(each)}

        def chosen(*leaves: jax.Array) -> jax.Array:
            return jnp.stack(leaves)[jnp.asarray(which, jnp.int32)]

        return {str(i): jax.tree.map(chosen, *networks) for i, networks in enumerate(each)}

    def in_loop(self, part: str) -> bool:
        """Whether the blocks of a part are a loop in passes over whole rows
        (`model.scan_layers`)."""
        alike = part != "core" or (not self.model.recursion_encoding and self.program.networks == 1)
        return in_loop(self.model.scan_layers, self._parts()[part], backend(), alike)

    def _used_once(self, params: Tree, part: str) -> Tree | Stack:
        """The blocks of a part, each of which is used once. Where they are a loop and lie whole on
        every device, matrices are stacked in the dtype that products read."""
        blocks = params[part]
        if not self.in_loop(part):
            return blocks
        if self._cut():
            return stacked(blocks)
        dtype = self.model.dtype
        return stacked(jax.tree.map(lambda w: w.astype(dtype) if w.ndim > 1 else w, blocks))

    def embed(
        self,
        params: Tree,
        tokens_BxT: jax.Array,
        pos_BxT: jax.Array,
        before_BxS: jax.Array | None = None,
    ) -> jax.Array:
        """Token states [B, T, D] in the compute dtype. `before_BxS`: of `block.embed`; default:
        those of the row, which may be cut along time."""
        if before_BxS is None and self.model.smear:
            row = join_rows(tokens_BxT)

            def shifted(i: int) -> jax.Array:
                return own_part(jnp.pad(row, ((0, 0), (i, 0)))[:, : row.shape[1]])

            before_BxS = jnp.concatenate(
                [shifted(i)[:, :1] for i in range(self.model.smear, 0, -1)], axis=1
            )
        return network.embed(self.model, self.with_table(params), tokens_BxT, before_BxS, pos_BxT)

    def with_table(self, params: Tree) -> Tree:
        """The parameters with the tables of embedding and head whole over the axes of the rows,
        gathered once however often they are asked for. Float32: they are read by rows, and in the
        head chunk by chunk."""
        # whole already
        if not manual_axes() or params["embed"]["table"].shape[1] == self.model.width:
            return params
        axes = self.logical_axes()

        def whole_table(name: str) -> jax.Array:
            return gather_weight(self.rules, params[name]["table"], axes[name]["table"])

        return params | {
            name: params[name] | {"table": whole_table(name)}
            for name in ("embed", "head")
            if name in params
        }

    def final_norm(self, params: Tree, x_BxTxD: jax.Array) -> jax.Array:
        """States as the head reads them."""
        return network.final_norm(self.model, params, x_BxTxD)

    def logits(self, params: Tree, h: jax.Array) -> jax.Array:
        """float32 logits [..., V] of final states [..., D]."""
        return network.head(self.model, params, h)

    def token_nll(self, params: Tree, h_BxTxD: jax.Array, targets_BxT: jax.Array) -> jax.Array:
        """Negative log-likelihood of each target in nats, [B, T] float32, of final states."""
        return token_nll(
            h_BxTxD, self._head_table(params), targets_BxT, self.model.loss_chunk, self._finish
        )

    def cross_entropy(
        self, params: Tree, h_BxTxD: jax.Array, targets_BxT: jax.Array, weights_BxT: jax.Array
    ) -> jax.Array:
        """Weighted sum of next-token losses in nats, of final states (`loss.cross_entropy_sum`)."""
        table = self._head_table(params)
        return cross_entropy_sum(
            h_BxTxD, table, targets_BxT, weights_BxT, self.model.loss_chunk, self._finish
        )

    def _head_table(self, params: Tree) -> jax.Array:
        return network.head_table(self.with_table(params))

    @property
    def _finish(self) -> Callable[[jax.Array], jax.Array]:
        return functools.partial(network.finish, self.model)

    def gathered_core(self, params: Tree) -> Tree:
        """Core weights in the compute dtype, gathered over fsdp once, before the recursion uses
        them R times."""
        axes = self.logical_axes()["core"]

        def gather(w: jax.Array, names: Axes) -> jax.Array:
            return gather_weight(self.rules, w, names, self.model.dtype)

        return jax.tree.map(gather, params["core"], axes)

    # ---------------------------------------------------------------- the full forward pass

    def attend_row(
        self, pos_BxT: jax.Array, q_seg_BxT: jax.Array, kv_seg_BxT: jax.Array, *, keep: bool = False
    ) -> Attend:
        """Attention among the tokens of one row; `keep`: beside its output, the keys and values."""
        impl = self.model.attention
        # what is visible goes by positions; where all is, they are all the same
        pos_BxT = jnp.zeros_like(pos_BxT) if self.model.bidirectional else pos_BxT

        def attend(
            q: jax.Array, k: jax.Array | None, v: jax.Array | None
        ) -> tuple[jax.Array, KeyValue | None]:
            assert k is not None and v is not None, "a row attends to its own"
            out = nn.attention(q, k, v, pos_BxT, pos_BxT, q_seg_BxT, kv_seg_BxT, impl)
            return out, (k, v) if keep else None

        return attend

    def core(self, params: Tree, pos_BxT: jax.Array, *, keep: bool, looped: bool = False) -> Core:
        """The core over rows with tokens at these positions, as the executors run it.

        `keep`: beside its output, the keys and values of each block. `looped`: its blocks are a
        loop where `in_loop` says so; keys and values are then stacked."""
        # A core that is used once has nothing to share: its blocks are gathered one by one, like
        # any others.
        once = (
            self.program.recursions * self.program.repeat == 1
            and not self.model.relaxed
            and self._cut()
        )
        core_params: Tree | Stack
        if once:
            core_params = self._used_once(params, "core") if looped else params["core"]
        else:
            core_params = self.gathered_core(params)
            if looped and self.in_loop("core"):
                core_params = stacked(core_params)
        rope = self.rope(pos_BxT)

        def run(
            h: jax.Array,
            pos_BxK: jax.Array,
            q_seg: jax.Array,
            kv_seg: jax.Array,
            past: Past | None = None,
            recursion: jax.Array | int | None = None,
        ) -> tuple[jax.Array, list[Any]]:
            attend: Attend | EachBlock
            table = rope if h.shape[1] == pos_BxT.shape[1] else self.rope(pos_BxK)
            if past is None:
                attend, queries_only = self.attend_row(pos_BxK, q_seg, kv_seg, keep=keep), False
            else:
                attend = attend_past(past, pos_BxK, q_seg, kv_seg, self.model.attention)
                queries_only = past.merge is None
            return self.blocks(
                core_params,
                h,
                table,
                attend,
                self.program.repeat,
                queries_only,
                recursion,
                gather=once,
            )

        return run

    def looped(
        self,
        core: Core,
        params: Tree,
        e_BxTxD: jax.Array,
        pos_BxT: jax.Array,
        salt_B: jax.Array | None = None,
        steps: jax.Array | int | None = None,
    ) -> tuple[Core, jax.Array]:
        """(the core as a step reads and leaves states, the state before the first step), from what
        the prelude returned.

        `steps`: of each row [B], or of all; default the model's."""
        if not self.recursion.reads:
            return core, e_BxTxD
        own, steps = (
            params.get("recursion", {}),
            self.program.recursions if steps is None else steps,
        )
        return self.loop.around(core, own, e_BxTxD, steps), self.loop.begin(
            own, e_BxTxD, pos_BxT, salt_B
        )

    def enter(self, params: Tree, tokens_BxT: jax.Array, segment_ids_BxT: jax.Array) -> jax.Array:
        """States [B, T, D] before the recursion."""

        def run(params: Tree, tokens: jax.Array, seg: jax.Array) -> tuple[jax.Array, tuple[()]]:
            pos = _positions(seg)
            x = self.rules.constrain(self.embed(params, tokens, pos), "batch", "time", None)
            prelude = self._used_once(params, "prelude")
            attend = self.attend_row(pos, seg, seg)
            x, _ = self.blocks(prelude, x, self.rope(pos), attend, gather=True)
            return x, ()

        in_axes = (self.logical_axes(), ROW, ROW)
        return over_rows(self.rules, run, in_axes, STATES)(params, tokens_BxT, segment_ids_BxT)[0]

    def route(
        self,
        params: Tree,
        x_BxTxD: jax.Array,
        tokens_BxT: jax.Array,
        segment_ids_BxT: jax.Array,
        salt_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """(profile, depth_BxT) of whole rows from what `enter` returned, for a policy that decides
        before the recursion.

        A training step calls it to differentiate one program of static sizes at a time. The depths
        travel along, so that a rounding difference between two compilations of the router cannot
        send a token to another depth.
        """

        def run(
            routers: Tree, x: jax.Array, tokens: jax.Array, seg: jax.Array, salt: jax.Array | None
        ) -> tuple[jax.Array, tuple[()]]:
            info = TokenInfo(seg > 0, _positions(seg), tokens, salt)
            return depths_at_once(self.policy, routers, x, info), ()

        in_axes = (
            self.logical_axes()["router"],
            STATES,
            ROW,
            ROW,
            None if salt_B is None else ("batch",),
        )
        depth_BxT, _ = over_rows(self.rules, run, in_axes, ROW)(
            params["router"], x_BxTxD, tokens_BxT, segment_ids_BxT, salt_B
        )
        return fitting_profile(self.policy.profiles(x_BxTxD.shape[1]), depth_BxT), depth_BxT

    def forward(
        self,
        params: Tree,
        tokens_BxT: jax.Array,
        segment_ids_BxT: jax.Array | None = None,
        *,
        mode: str = TOPK,
        executor: str | None = None,
        profile: int | None = None,
        depth_BxT: jax.Array | None = None,
        entered_BxTxD: jax.Array | None = None,
        control: DepthControl | None = None,
        salt_B: jax.Array | None = None,
    ) -> Forward:
        """Final states of whole rows.

        Args:
          segment_ids_BxT: packing segments, 0 = padding; None: every row is one document.
          mode: "topk" (training; sees the future under expert-choice) or "causal" (what generation
            computes).
          executor: "gathered" or "masked"; default: the configuration's. Causal mode is always
            masked, its counts depend on the data, and so are steps with knobs of
            `config.recursion` and policies that stop tokens by their states.
          profile, depth_BxT: what `route` said of these very rows, for the gathered executor under
            token-choice.
          entered_BxTxD: what `enter` returned for them, if it has run already.
          control: dial, floor and cap of each row's depth, in causal mode.
          salt_B: of each row's draws, for a policy that draws (`TokenInfo`).
        """
        if control is not None and mode != CAUSAL:
            raise ValueError(
                "a depth control goes with mode='causal'; top-k selection fills its capacities"
            )
        seg = jnp.ones_like(tokens_BxT) if segment_ids_BxT is None else segment_ids_BxT
        gathered = (
            mode == TOPK
            and (executor or self.depth.executor) == "gathered"
            and not (self.recursion.reads or self.policy.halts)
        )

        def run(
            params: Tree,
            tokens: jax.Array,
            seg: jax.Array,
            depth: jax.Array | None,
            entered: jax.Array | None,
            control: DepthControl | None,
            salt: jax.Array | None,
        ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], RouterStats]:
            pos, kv = _positions(seg), self.kv(mode)
            x = self.enter(params, tokens, seg) if entered is None else entered
            core = self.core(params, pos, keep=looks_back(kv), looped=True)
            core, x = self.looped(core, params, x, pos, salt)
            execute: Callable[..., Recursed]
            if gathered:
                execute = functools.partial(run_gathered, self.policy, profile=profile)
            else:
                seen = self.seen(join_rows(tokens), join_rows(pos))
                seen = None if seen is None else own_part(seen)
                steered = self.steered(control, params if mode == CAUSAL else None, seen)
                execute = functools.partial(run_masked, steered, causal=mode == CAUSAL)
            of_tokens = {"depth_BxT": depth, "ids_BxT": tokens, "salt_B": salt}
            rows = params["router"], core, x, pos, seg
            result = execute(*rows, kv=kv, numbered=self.numbered, **of_tokens)
            attend = self.attend_row(pos, seg, seg)
            x, coda = self.loop.read(result.h_BxTxD), self._used_once(params, "coda")
            x, _ = self.blocks(coda, x, self.rope(pos), attend, gather=True)
            h = self.rules.constrain(self.final_norm(params, x), "batch", "time", None)
            return (h, result.depth_BxT, result.active_RxBxT), result.stats

        axes = (
            self.logical_axes(),
            ROW,
            ROW,
            None if depth_BxT is None else ROW,
            None if entered_BxTxD is None else STATES,
            None if control is None else CONTROL,
            None if salt_B is None else ("batch",),
        )
        rows, stats = over_rows(self.rules, run, axes, (STATES, ROW, (None, *ROW)))(
            params, tokens_BxT, seg, depth_BxT, entered_BxTxD, control, salt_B
        )
        h, depth, active_RxBxT = rows
        return Forward(h, depth, stats, active_RxBxT)

    def unroll(
        self,
        params: Tree,
        tokens_BxT: jax.Array,
        segment_ids_BxT: jax.Array,
        *,
        steps_B: jax.Array | None = None,
        salt_B: jax.Array | None = None,
    ) -> tuple[Unrolled, jax.Array]:
        """Rows as training with `recursion.trains` runs them: (the recursion, final normalised
        states).

        Final states are [S, B, T, D], after each step that has a gradient (or each segment), if the
        loss asks for more than the last, else [B, T, D]. To be called on the rows of one device
        (`parallel.rows.over_rows`).

        Args:
          steps_B: steps of each row, int32; None: the configured recursions.
        """
        c, seg = self.recursion, segment_ids_BxT
        pos = _positions(seg)
        e = self.enter(params, tokens_BxT, seg)
        s = e
        if self.recursion.reads:
            s = self.loop.begin(params.get("recursion", {}), e, pos, salt_B)
        out = self.run_steps(
            params, s, e, seg, steps_B=steps_B, salt_B=salt_B, keep=c.loss != "final"
        )
        h = out.h_BxTxD if out.states_SxBxTxD is None else out.states_SxBxTxD
        return out, self.leave(params, self.loop.read(h), seg)

    def run_steps(
        self,
        params: Tree,
        s: jax.Array,
        e_BxTxD: jax.Array,
        segment_ids_BxT: jax.Array,
        *,
        steps_B: jax.Array | None = None,
        salt_B: jax.Array | None = None,
        keep: bool = False,
    ) -> Unrolled:
        """The steps of a training step, from the state s before the first and what `enter`
        returned; see `unroll`. `keep`: also the states after each step that has a gradient, or
        after each segment."""
        c, pos = self.recursion, _positions(segment_ids_BxT)
        steps = self.program.recursions if steps_B is None else steps_B

        def make_core(params: Tree, e: jax.Array) -> Core:
            core = self.core(params, pos, keep=False, looped=True)
            return self.looped(core, params, e, pos, salt_B, steps)[0]

        if c.solver != "none":
            return run_to_rest(
                make_core,
                params,
                s,
                e_BxTxD,
                pos,
                segment_ids_BxT,
                most=self.program.recursions,
                config=c,
            )
        return run_unrolled(
            make_core,
            params,
            s,
            e_BxTxD,
            pos,
            segment_ids_BxT,
            most=self.program.recursions if steps_B is None else c.most(self.program.recursions),
            window=c.gradient_steps,
            steps_B=steps_B,
            keep=keep,
            segments=c.segments,
        )

    def leave(self, params: Tree, h: jax.Array, segment_ids_BxT: jax.Array) -> jax.Array:
        """Final normalised states of rows [..., B, T, D] that leave the recursion."""
        seg, rows = segment_ids_BxT, h.reshape(-1, *h.shape[-2:])

        def tile(x: jax.Array) -> jax.Array:
            return jnp.tile(x, (rows.shape[0] // x.shape[0], 1))

        pos, seg = tile(_positions(seg)), tile(seg)
        coda, attend = self._used_once(params, "coda"), self.attend_row(pos, seg, seg)
        x, _ = self.blocks(coda, rows, self.rope(pos), attend, gather=True)
        x = self.rules.constrain(self.final_norm(params, x), "batch", "time", None)
        return x.reshape(h.shape)

    def apply(
        self,
        params: Tree,
        tokens_BxT: jax.Array,
        segment_ids_BxT: jax.Array | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """float32 logits [B, T, V]; keyword arguments as in `forward`."""
        return self.logits(
            params, self.forward(params, tokens_BxT, segment_ids_BxT, **kwargs).h_BxTxD
        )


__all__ = ["CAUSAL", "LM", "ROW", "STATES", "TOPK", "Forward", "Recursed", "positions_in_document"]
