"""A process that has imported what every command imports, and forks one for each command it is
asked to run.

Importing JAX, Flax, Orbax and Grain is most of the time of a command that refuses its arguments.
This process does it once, starts no JAX backend, and serves one command a connection to the Unix
socket named by its first argument: a JSON line of arguments, folder and environment comes with the
three standard descriptors; the process id and, at the end, the exit status go back. It ends with
its standard input.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
from pathlib import Path

# where the command's own process would begin: the checkout
sys.path[0] = str(Path(__file__).resolve().parents[2])


def next_command(path: str) -> list[str]:
    """Serve; returns only in a process forked for a command, with its name and arguments."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    # those who wait for commands are waited for by nobody
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(1, b"ready\n")
    while True:
        readable, _, _ = select.select([listener, 0], [], [])
        if 0 in readable:
            os._exit(0)
        connection, _ = listener.accept()
        if not os.fork():
            break
        connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    listener.close()
    line, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not line.endswith(b"\n"):
        line += connection.recv(1 << 20)
    asked = json.loads(line)
    if pid := os.fork():
        connection.sendall(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    connection.close()
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    return asked["args"]


if __name__ == "__main__":
    import launch.cli  # noqa: F401
    import mor_jax.analysis.plots
    import mor_jax.inference.text
    import mor_jax.train.loop
    import mor_jax.train.present
    import mor_jax.train.sweep  # noqa: F401

    gc.freeze()  # a command's process need not look through all of that
    name, *arguments = next_command(sys.argv[1])
    sys.argv[1:] = arguments
    runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)
