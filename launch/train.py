"""Train a model, or go on with a run that was stopped.

    python -m launch.train --config configs/quickstart.py --workdir runs/mor
    python -m launch.train --config configs/sft.py --workdir runs/chat --init_from runs/mor
    python -m launch.train --config configs/quickstart.py --workdir runs/short \\
        --config.train.steps=200
    python -m launch.train --config configs/quickstart.py --workdir runs/end \\
        --anneal_from runs/mor --anneal_steps 200
    python -m launch.train --config configs/mor.py:360m,nr=3 --workdir runs/mor360 \\
        --config.data.source=files --config.data.paths="('/data/*.jsonl.zst',)"

The run directory receives config.json, tokenizer.json, metrics.jsonl, tensorboard/, checkpoints/
and, at the end, summary.json. It may be in an object store: --workdir gs://bucket/run or
s3://bucket/run. The same command on the same directory resumes, with another mesh, other intervals,
remat or attention if you like; what would change the numbers is refused unless --allow names it,
and what the weights are cannot change. One process at a time works in a directory. Ctrl-C or
SIGTERM saves first and exits with 0.

On several hosts start the same command on each; TPU VMs, Slurm steps and indexed Kubernetes jobs
are recognised, else set JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID. A
signal to one stops all after the same step; where one is lost the others name it and exit with
status 75.

From a notebook:

    from mor_jax.config import from_config_dict
    from mor_jax.train.loop import train
    summary = train(from_config_dict(quickstart.get_config()), "runs/mor")
"""

from absl import flags

from launch import cli
from mor_jax.errors import UserError
from mor_jax.parallel.join import initialize
from mor_jax.train.branch import anneal
from mor_jax.train.debug import Debug
from mor_jax.train.loop import train

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run directory; created, or resumed if it holds this run.", required=True
)
_WAIT = flags.DEFINE_float(
    "wait",
    None,
    "Seconds to wait while another process works in the directory; default: 0, under Slurm or Kubernetes 600.",
)
_ALLOW = flags.DEFINE_list(
    "allow",
    [],
    "Fields that may differ from those of the run that goes on, e.g. optim.peak_lr,train.steps.",
)
_INIT_FROM = flags.DEFINE_string(
    "init_from",
    "",
    "Run directory or checkpoint whose weights a new run starts from; optimiser and data start fresh.",
)
_ANNEAL_FROM = flags.DEFINE_string(
    "anneal_from",
    "",
    "Run to branch off while its rate is constant: all of its state, then the rate falls to its end.",
)
_ANNEAL_STEPS = flags.DEFINE_integer(
    "anneal_steps", 0, "Of --anneal_from: steps over which the rate falls."
)
_ANNEAL_AT = flags.DEFINE_integer(
    "anneal_at", None, "Of --anneal_from: checkpoint to branch off; default: the newest."
)
_RLM_EVAL = flags.DEFINE_list(
    "rlm_eval",
    None,
    "Tasks of `rlm tasks` that the model leads at each evaluation, e.g. s_niah; into metrics.jsonl.",
)
_RLM_LENGTHS = flags.DEFINE_list("rlm_lengths", ["8k"], "Their lengths in tokens.")
_RLM_SAMPLES = flags.DEFINE_integer(
    "rlm_samples", 16, "Runs of each task and length.", lower_bound=1
)
_PROFILE = flags.DEFINE_list(
    "profile_steps", None, "First and last step to trace, e.g. 20,22; into <workdir>/profile."
)
_NANS = flags.DEFINE_bool(
    "debug_nans", False, "Stop at the operation that first makes a NaN; slower."
)
_NO_SCAN = flags.DEFINE_bool("no_scan", False, "Unroll the loops over recursion steps and chunks.")
_NO_JIT = flags.DEFINE_bool(
    "no_jit", False, "Compile nothing: operation by operation, for a debugger; very slow."
)


def main(_: list[str]) -> None:
    debug = Debug.parse(
        _PROFILE.value, nans=_NANS.value, scan=not _NO_SCAN.value, jit=not _NO_JIT.value
    )
    initialize()  # before anything asks how many devices there are
    cfg = cli.read_config(_CONFIG)
    if _ANNEAL_FROM.value:
        if _INIT_FROM.value:
            raise UserError(
                "--init_from means nothing with --anneal_from, which takes the whole state."
            )
        cfg = anneal(
            cfg, _ANNEAL_FROM.value, _WORKDIR.value, _ANNEAL_STEPS.value, step=_ANNEAL_AT.value
        )
    measure = None
    if _RLM_EVAL.value:
        from rlm_runtime.training.measure import TaskSuccess

        measure = TaskSuccess(_RLM_EVAL.value, _RLM_LENGTHS.value, _RLM_SAMPLES.value)
    train(
        cfg,
        _WORKDIR.value,
        debug=debug,
        wait=_WAIT.value,
        allow=_ALLOW.value,
        init_from=_INIT_FROM.value,
        measure=measure,
    )


if __name__ == "__main__":
    cli.run(main)
