"""Run a command as a job of several processes on this machine.

    python -m launch.local --processes 2 -- launch.train --config configs/quickstart.py \\
        --workdir runs/two
    # 2 x 4 simulated CPU devices
    python -m launch.local --processes 2 --devices 4 --dry_run -- launch.train ...
    python -m launch.local --processes 4 --gpus 2 -- launch.train ...  # GPUs 0,1 to the first, ...

Each line of output carries the number of its process. Ctrl-C and SIGTERM are passed on, so that the
job saves and ends; a process that fails ends the others. With --restarts, a job that lost a process
is started again and goes on from its last checkpoint. The exit status is that of the first process
that failed.
"""

import sys

from absl import flags

from launch import cli
from launch.jobs import local_environments, python_command, run_line, shell_line
from mor_jax.parallel.processes import free_port, lost_a_process, run_job

_PROCESSES = flags.DEFINE_integer("processes", 1, "Processes of the job.", lower_bound=1)
_DEVICES = flags.DEFINE_integer(
    "devices", 0, "Simulated CPU devices of each; 0: the hardware there is.", lower_bound=0
)
_GPUS = flags.DEFINE_integer(
    "gpus", 0, "GPUs of each process; 0: whatever it finds.", lower_bound=0
)
_PORT = flags.DEFINE_integer("port", 0, "Port of the first process; 0: a free one.", lower_bound=0)
_RESTARTS = flags.DEFINE_integer(
    "restarts", 0, "Times a job that lost a process is started again.", lower_bound=0
)
_GRACE = flags.DEFINE_float(
    "grace", 120.0, "Seconds the others have to end after one has failed.", lower_bound=0.0
)
_DRY = flags.DEFINE_bool("dry_run", False, "Print the commands, run nothing.")


def main(arguments: list[str]) -> None:
    command = python_command(arguments, sys.executable)
    for start in range(1, _RESTARTS.value + 2):
        port = _PORT.value or (8476 if _DRY.value else free_port())
        envs = local_environments(
            _PROCESSES.value, port=port, devices=_DEVICES.value, gpus=_GPUS.value
        )
        if _DRY.value:
            print("\n".join(shell_line(command, env) for env in envs))
            return
        status = run_job(run_line(command), envs, grace=_GRACE.value)
        if not lost_a_process(status) or start > _RESTARTS.value:
            sys.exit(status if status >= 0 else 128 - status)
        print(
            f"[job] lost a process (status {status}); start {start + 1} of {_RESTARTS.value + 1}",
            flush=True,
        )


if __name__ == "__main__":
    cli.run(main, arguments=True)
