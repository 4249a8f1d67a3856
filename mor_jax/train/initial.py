"""Where the weights of a run come from: fresh ones, or those of another run's checkpoint."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import optax
from etils import epath

from mor_jax.config import Config
from mor_jax.data.chat import find_template
from mor_jax.data.prepare import PreparedData
from mor_jax.data.vocabulary import Tokenizer
from mor_jax.errors import CheckpointError, ConfigError
from mor_jax.model.adapter import Adapters
from mor_jax.model.lm import LM
from mor_jax.train.checkpoint import load_meta
from mor_jax.train.load import Loaded, chat_template, checkpoint_directory, load_model
from mor_jax.train.preference import Reference
from mor_jax.train.state import Trained, TrainState, abstract_state, create_state

# Fields of `model` that may differ between the checkpoint and the run: how it is executed, how long
# its rows are, and how positions are scaled for longer ones.
FREE = frozenset(
    {"context", "init_std", "dtype", "remat", "attention", "loss_chunk", "scan_layers"}
)


def initial_params(
    path: str | os.PathLike[str],
    cfg: Config,
    tokenizer: Tokenizer,
    lm: LM,
    mesh: jax.sharding.Mesh,
    step: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters as `lm.init` would make them, lineage) from the newest checkpoint in `path`, or
    that of `step`.

    The optimiser, the schedule and the position in the data start fresh. `lineage` says where the
    weights came from: parent, step, data (fingerprint of its rows), and the parent's own lineage.

    Raises:
      CheckpointError: the checkpoint cannot be read, has another architecture or another tokenizer.
    """
    loaded = load_model(path, step, mesh=mesh)
    _check(loaded, path, cfg, tokenizer)
    placed = jax.device_put(loaded.params, lm.rules.shardings(mesh, lm.logical_axes()))
    lineage = {"parent": os.fspath(path), "step": loaded.step, "data": loaded.data}
    return placed, lineage | ({"before": loaded.lineage} if loaded.lineage else {})


def _free(name: str) -> bool:
    return name in FREE or name.startswith("rope_")


def _check(loaded: Loaded, path: str | os.PathLike[str], cfg: Config, tokenizer: Tokenizer) -> None:
    old, new = dataclasses.asdict(loaded.lm.model), dataclasses.asdict(cfg.model)
    differ = [name for name in old if old[name] != new[name] and not _free(name)]
    wrong = [f"model.{name} {old[name]!r} there, {new[name]!r} here" for name in differ]
    old_policy, new_policy = loaded.config.depth.policy, cfg.depth.policy
    if old_policy != new_policy:
        wrong.append(f"depth.policy {old_policy!r} there, {new_policy!r} here")
    shapes = jax.eval_shape(LM.from_config(cfg).init, jax.random.key(0))
    if not wrong and jax.tree.map(lambda x: x.shape, shapes) != jax.tree.map(
        lambda x: x.shape, loaded.params
    ):
        wrong.append("the routers have other shapes")
    if wrong:
        raise CheckpointError(
            f"--init_from={path}: its weights do not fit this configuration ({'; '.join(wrong)}). Use the same "
            "architecture, or launch.convert to make a recursive model of an unshared one."
        )
    if tokenizer.fingerprint() != loaded.tokenizer.fingerprint():
        raise CheckpointError(
            f"--init_from={path}: config.data.tokenizer = {cfg.data.tokenizer!r} gives another tokenizer than the one it "
            "was trained with. Use its own: the tokenizer.json in its run directory."
        )


class Origin:
    """The weights that a run begins with or goes on from, and what its checkpoints say of them.

    Attributes:
      meta: what travels with every checkpoint: config, tokenizer, data, and once known lineage and
        chat_template.
      adapters: what is trained in place of the model's weights; None: those.
      trained: what the state's parameters are.
      base: of adapters, the weights they belong to.

    Args:
      init_from: see `loop.train`.
      other_data: whether a checkpoint of other rows is gone on from.
      say: takes a line for the user.
    """

    def __init__(
        self,
        cfg: Config,
        workdir: epath.Path,
        data: PreparedData,
        mesh: jax.sharding.Mesh,
        init_from: str | os.PathLike[str],
        other_data: bool,
        say: Callable[[str], None],
    ):
        self._cfg, self._workdir, self._tokenizer, self._mesh = cfg, workdir, data.tokenizer, mesh
        self._init_from, self._other_data, self._say = os.fspath(init_from), other_data, say
        self.lm = LM.from_config(cfg)
        self.adapters = Adapters(self.lm, cfg.adapter) if cfg.adapter.rank else None
        self.trained: Trained = self.adapters or self.lm
        self.base: Any = None
        self._merge = None if self.adapters is None else jax.jit(self.adapters.merged)
        self.meta: dict[str, Any] = {
            "config": cfg.to_dict(),
            "tokenizer": data.tokenizer.to_json(),
            "data": data.fingerprint,
        }
        # of the corpus, or of the weights that the run began with
        chat = data.template or find_template(workdir)
        if not chat.plain:
            self.meta["chat_template"] = chat.source

    def whole(self, params: Any) -> Any:
        """The model's parameters, of those of a state."""
        return params if self._merge is None else self._merge(self.base, params)

    def abstract(self, tx: optax.GradientTransformation) -> TrainState:
        """What a checkpoint of the run is restored into."""
        return abstract_state(self.trained, tx, self._mesh, bool(self._cfg.optim.ema))

    def fresh(self, tx: optax.GradientTransformation) -> TrainState:
        """The state of step 0. Raises ConfigError, CheckpointError: see `initial_params`."""
        state = create_state(
            self.trained, tx, self._mesh, self._cfg.train.seed, bool(self._cfg.optim.ema)
        )
        if not self._init_from:
            if self.adapters:
                raise ConfigError(
                    f"config.adapter.rank = {self._cfg.adapter.rank} trains adapters of the weights of another run: give "
                    "--init_from, or set it to 0 to train all weights."
                )
            return state
        params, lineage = initial_params(
            self._init_from, self._cfg, self._tokenizer, self.lm, self._mesh
        )
        self.meta["lineage"] = lineage
        if template := chat_template(
            self._init_from, load_meta(checkpoint_directory(self._init_from))[1]
        ):
            self.meta.setdefault("chat_template", template)
        self._say(f"Starting from the weights of {self._init_from}, step {lineage['step']}.")
        if self.adapters:
            self.base = params
            return state
        return state.starting_from(params)

    def accept(self, meta: dict[str, Any]) -> None:
        """Take over what a checkpoint of this run says. Raises CheckpointError: the run cannot go
        on from it."""
        self.check_data(meta)
        if "chat_template" in meta:
            self.meta.setdefault("chat_template", meta["chat_template"])
        self._same_origin(meta)
        self._keep_base()

    def reference(self) -> Reference:
        """The weights that the run began with. Raises ConfigError: it began with none."""
        params, came = self.base, self.meta.get("lineage")
        if not came:
            raise ConfigError(
                "config.data.format = 'preference' holds the model to the weights that it starts from: give --init_from."
            )
        if params is None:
            params, _ = initial_params(
                came["parent"], self._cfg, self._tokenizer, self.lm, self._mesh, came["step"]
            )
        return Reference(self.lm, params, self._cfg.preference.beta)

    def check_data(self, meta: dict[str, Any]) -> None:
        """Raises CheckpointError if the checkpoint was trained with another tokenizer or other
        data."""
        if meta["tokenizer"] != self.meta["tokenizer"]:
            raise CheckpointError(
                f"the tokenizer {self._cfg.data.tokenizer!r} does not fit the checkpoint in {self._workdir}: it was trained "
                "with another one. Put the old one back, or give another --workdir."
            )
        if meta["data"] != self.meta["data"] and not self._other_data:
            raise CheckpointError(
                f"the corpus has changed since {self._workdir} was started, so the run cannot go on with the same rows. "
                "Restore the corpus, give another --workdir, or --allow=data.paths to go on with the new rows."
            )

    def _same_origin(self, meta: dict[str, Any]) -> None:
        """Keep the lineage of the run; refuse to go on as if it had started from other weights."""
        if lineage := meta.get("lineage"):
            self.meta["lineage"] = lineage
        parent = (lineage or {}).get("parent", "")
        if self._init_from and self._init_from != parent:
            was = f"the weights of {parent}" if parent else "fresh weights"
            raise CheckpointError(
                f"{self._workdir} holds a run that started from {was}, not from {self._init_from}. Give another --workdir, "
                "or leave out --init_from to go on."
            )

    def _keep_base(self) -> None:
        """Of a run of adapters that goes on: the weights they belong to."""
        if self.adapters and self.base is None:
            came = self.meta["lineage"]
            self.base, _ = initial_params(
                came["parent"], self._cfg, self._tokenizer, self.lm, self._mesh, came["step"]
            )
