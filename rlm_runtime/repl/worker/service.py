"""What the worker does from its first to its last moment: greet, lock itself in, then whatever the
host asks for."""

from __future__ import annotations

import _thread
import os
import sys

from . import confine, imports, interrupts, kernel
from .calls import Calls
from .cells import Repl
from .channel import Channel


class Service:
    def __init__(self, channel: Channel, hello: dict, mirrors):
        self._channel, self._limits = channel, hello["limits"]
        channel.frame = self._limits["frame"]
        self._calls = Calls(channel)
        self._jobs: list = []
        self._waiting = _thread.allocate_lock()
        self._waiting.acquire()
        self._running = ""
        sys.meta_path.insert(0, imports.Asyncio())
        sys.meta_path.append(
            imports.Packages(hello["packages"]["sites"], hello["packages"]["tops"])
        )
        self._repl = Repl(self._calls, self._limits, hello["tools"], _hint, mirrors)

    def handle(self, message: dict, fd: int | None) -> None:
        """In the reading thread."""
        kind = message["t"]
        if kind == "reply":
            self._calls.reply(message)
        elif kind == "look":
            if message["id"] == self._running:
                self._channel.write_now(
                    {"t": "waits", "id": message["id"], "waits": self._calls.main_waits()}
                )
        elif kind == "interrupt":
            if message["id"] == self._running:
                interrupts.interrupt(message["why"])
        else:
            self._jobs.append((message, fd))
            if self._waiting.locked():
                self._waiting.release()

    def work(self) -> None:
        """The main thread: one job after the other."""
        while True:
            while not self._jobs:
                try:
                    self._waiting.acquire()
                except BaseException:  # what a thread left over from a cell had raised here
                    continue
            message, fd = self._jobs.pop(0)
            getattr(self, "_" + message["t"])(message, fd)

    def _cell(self, message: dict, _fd) -> None:
        self._running = message["id"]
        try:
            self._repl.prepare(message)
        except BaseException as problem:
            self._channel.send({"t": "broken", "id": message["id"], "message": repr(problem)[:500]})
            return
        try:
            data = self._channel.encode(self._repl.run(message))
        except BaseException as problem:  # too large, or no memory left to say it all
            data = self._channel.encode(self._repl.failed(message, problem))
        self._running = ""
        self._channel.write(data)

    def _load(self, message: dict, fd: int | None) -> None:
        """Bind a context under a name; a file came as an open descriptor where the channel can
        carry one."""
        answer = {"t": "loaded", "id": message["id"], "error": None}
        try:
            self._repl.interpreter.restore()
            with_text = _loaded["worker.text"].load
            if message["fd"] and fd is None:
                raise OSError("no descriptor is left to open it with")
            value = with_text(
                message["mode"], message["path"] if fd is None else fd, message["args"]
            )
            self._repl.bind(message["name"], value)
            self._repl.interpreter.note_modules()
        except BaseException as problem:
            answer["error"] = f"{type(problem).__name__}: {problem}"[:1000]
        if fd is not None and message["mode"] != "mmap":
            os.close(fd)
        self._channel.send(answer)


def _hint(error: BaseException) -> str | None:
    return _loaded["worker.text"].hint(error)


def _packages(packages: dict) -> dict:
    """A site folder without a path is this interpreter's own (the host does not know it)."""
    sites = [
        os.path.join(os.path.dirname(os.__file__), s) if "/" not in s else s
        for s in packages["sites"]
    ]
    own = [s for s in sites if s not in packages["sites"]]
    return packages | {"sites": sites, "paths": packages["paths"] + own}


def _mirrors(mirror: dict) -> tuple:
    """Memory shared with the host, for stdout and stderr."""
    try:
        whole = kernel.shared(mirror["path"], 2 * mirror["size"])
    except OSError:
        whole = None
    return (None, None) if whole is None else (whole[: mirror["size"]], whole[mirror["size"] :])


_loaded: dict = {}


def main(arguments: list[str]) -> None:
    """`arguments`: the descriptor of the channel, or "stdio"."""
    if arguments[0] == "stdio":
        read_fd, write_fd = os.dup(0), os.dup(1)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(2, 1)
    else:
        read_fd = write_fd = int(arguments[0])
    channel = Channel(read_fd, write_fd)
    received = channel.receive()
    if received is None:
        return
    hello = received[0]
    spec = hello["confine"] | {"protocol": list(channel.fds), "socket": channel.socket}
    import faulthandler
    import linecache  # noqa: F401 - so that a traceback printed by a cell finds the cell's lines

    import worker.text  # noqa: F401 - what the runtime needs is there before any cell can stand in the way

    faulthandler.enable(2)
    hello["packages"] = spec["packages"] = _packages(hello["packages"])
    mirrors = _mirrors(hello["mirror"])
    layers = confine.confine(spec)
    problem = confine.enter(spec["scratch"])
    service = Service(channel, hello, mirrors)
    for name in [name for name in sys.modules if name == "worker" or name.startswith("worker.")]:
        # kept alive, and out of the way of a cell's own names
        _loaded[name] = sys.modules.pop(name)
    channel.read_for_ever(service.handle)
    channel.send({"t": "ready", "layers": layers, "problem": problem, "pid": os.getpid()})
    service.work()
