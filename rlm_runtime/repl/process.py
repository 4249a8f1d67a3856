"""One worker process and the pipes to it. It knows nothing of cells: bytes in, frames out, stop, go
on, kill."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import os
import resource
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rlm_runtime.repl import wire
from rlm_runtime.repl.spawn import SPAWNER, SpawnOptions

READ = 1 << 16
ROUND = 8  # reads in one go, so that no worker keeps the event loop to itself
# seconds of the event loop that frames get in one go; there may be a hundred thousand in a second
SLICE = 0.01
INLINE = (
    1 << 16
)  # bytes of a frame that is decoded in the event loop: some 5 ms; a longer one on a thread of the loop's pool
# bytes past sys.stdout read at full speed; then a pause after each round
RAW_FREE, RAW_PAUSE = 64 << 20, 0.02


class Raw:
    """What is written to a descriptor past `sys.stdout` (C code, a crash report): head and tail,
    bounded."""

    def __init__(self, limit: int):
        self._limit = max(limit, 256)
        self.clear()

    def clear(self) -> None:
        self._head, self._tail, self.bytes = bytearray(), bytearray(), 0

    def feed(self, data: bytes) -> None:
        self.bytes += len(data)
        room = self._limit - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if data:
            self._tail += data[-self._limit :]
            del self._tail[: -self._limit]

    def text(self) -> str:
        hidden = self.bytes - len(self._head) - len(self._tail)
        middle = b"\n[... %d bytes hidden ...]\n" % hidden if hidden > 0 else b""
        return bytes(self._head + middle + self._tail).decode("utf-8", "replace")


class Process:
    """A started worker. `on_frame(message, bytes)` and `on_end()` are called in the event loop, the
    latter once; the message is None for a line that is no frame. Frames come in order and before
    the end, however long one is read.

    `gate()` says whether the host has room for more frames just now; `resume_reading` opens it
    again.
    """

    def __init__(self, process: subprocess.Popen[bytes], frame: int, raw: int, group: bool):
        self.popen, self.pid, self._group = process, process.pid, group
        self.loop = asyncio.get_running_loop()
        self.lines = wire.Lines(frame)
        self.raw = {"stdout": Raw(raw), "stderr": Raw(raw)}
        self.worker_pid: int | None = None  # of the worker itself, as the host sees it
        self.ended: asyncio.Future[int] = self.loop.create_future()
        self.on_frame: Callable[[dict[str, Any] | None, int], None] = lambda message, size: None
        self.on_end: Callable[[], None] = lambda: None
        self.gate: Callable[[], bool] = lambda: True
        self.stopped = self.killed = False
        self._socket: socket.socket | None = None
        self._in = self._out = -1
        self._pidfd = -1
        self._queue: deque[tuple[memoryview, int | None]] = deque()
        self.unsent = 0
        self._reading = self._writing = False
        # of a long frame; no other is taken meanwhile
        self._decoding: asyncio.Task[None] | None = None
        self._waits = False  # a slice of the loop is over, and the next one comes
        self._gone = False  # the process has ended, and what it said last is still being read
        self._raw_fds: dict[int, str] = {}

    # -- start

    @classmethod
    async def start(cls, launch: Launch, *, frame: int, raw: int) -> Process:
        """Raises OSError."""
        with contextlib.ExitStack() as stack:

            def pipe() -> tuple[int, int]:
                ends = os.pipe2(os.O_CLOEXEC)
                for fd in ends:
                    stack.callback(_close, fd)
                return ends

            options: SpawnOptions = {
                "env": launch.env,
                "cwd": "/",
                "close_fds": True,
                "start_new_session": True,
            }
            stderr_r, stderr_w = pipe()
            if launch.stdio:
                in_r, in_w = pipe()
                out_r, out_w = pipe()
                options |= {"stdin": in_r, "stdout": out_w, "stderr": stderr_w}
                popen = await SPAWNER.popen(launch.argv(None), **options)
            else:
                ours, theirs = socket.socketpair()
                stack.callback(ours.close)
                stack.callback(theirs.close)
                stdout_r, stdout_w = pipe()
                options |= {"stdin": subprocess.DEVNULL, "stdout": stdout_w, "stderr": stderr_w}
                options["pass_fds"] = (theirs.fileno(),)
                popen = await SPAWNER.popen(launch.argv(theirs.fileno()), **options)
            self = cls(popen, frame, raw, launch.group)
            if launch.stdio:
                self._in, self._out = os.dup(out_r), os.dup(in_w)
            else:
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                self._socket = ours.dup()
                self._in = self._out = self._socket.fileno()
                self._raw_fds[os.dup(stdout_r)] = "stdout"
            self._raw_fds[os.dup(stderr_r)] = "stderr"
            for fd in {self._in, self._out, *self._raw_fds}:
                os.set_inheritable(fd, False)
                os.set_blocking(fd, False)
        self._open()
        return self

    def _open(self) -> None:
        for fd in self._raw_fds:
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, 1031, 1 << 18)  # F_SETPIPE_SZ: fewer, larger reads
            self.loop.add_reader(fd, self._read_raw, fd)
        self._pidfd = os.pidfd_open(self.pid)
        self.loop.add_reader(self._pidfd, self._exited)
        self.resume_reading()

    # -- frames

    @property
    def takes_descriptors(self) -> bool:
        """Whether a descriptor can travel with a message."""
        return self._socket is not None

    def resume_reading(self) -> None:
        if not self._reading and self._in >= 0 and self.gate():
            self._reading = True
            self.loop.add_reader(self._in, self._readable)
            if self.lines.held:
                self._dispatch_soon()

    def _pause_reading(self) -> None:
        if self._reading:
            self._reading = False
            self.loop.remove_reader(self._in)

    def _readable(self) -> None:
        self._receive(ROUND)

    def _receive(self, rounds: int) -> None:
        for _ in range(rounds):
            if self._in < 0:
                break
            if not self.gate():
                self._pause_reading()
                break
            try:
                data = self._read()
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                data = b""
            if not data:
                self._pause_reading()
                self._lost()
                break
            self.lines.feed(data)
            self._dispatch()
            if self._waits or self._decoding or (len(data) < READ // 4 and rounds == ROUND):
                break

    def _read(self) -> bytes:
        if self._socket is None:
            return os.read(self._in, READ)
        if self.worker_pid is not None:
            return self._socket.recv(READ)
        data, ancillary, _, _ = self._socket.recvmsg(READ, socket.CMSG_SPACE(12))
        for level, kind, payload in ancillary:
            # filled in by the kernel
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                self.worker_pid = array.array("i", payload[:4])[0]
        return data

    def _dispatch(self) -> None:
        """Hand on what has come, for as long as the host has room and a slice of the loop lasts."""
        until = time.monotonic() + SLICE
        while self._in >= 0 and not self._decoding:
            if not self.gate():
                self._pause_reading()
                return
            line = self.lines.next()
            if line is None:
                return
            if len(line) > INLINE:
                self._pause_reading()
                self._decoding = self.loop.create_task(self._decode_beside(line))
            else:
                self.on_frame(_decoded(line), len(line))
                if time.monotonic() > until:
                    self._pause_reading()
                    self._dispatch_soon()
                    return

    def _dispatch_soon(self) -> None:
        if not self._waits:
            self._waits = True
            self.loop.call_soon(self._dispatch_again)

    def _dispatch_again(self) -> None:
        self._waits = False
        self._dispatch()
        if self._gone:
            self._last_words()
        elif not self._waits and not self._decoding:
            self.resume_reading()

    async def _decode_beside(self, line: bytes) -> None:
        message = await asyncio.to_thread(_decoded, line)
        self._decoding = None
        if self._in >= 0:
            self.on_frame(message, len(line))
            self._dispatch_soon()

    def send(self, message: dict[str, Any], fd: int | None = None) -> None:
        """Queue a message; `fd` travels with it and is closed here once it is on its way."""
        if self._out < 0:
            if fd is not None:
                os.close(fd)
            return
        self.send_encoded(wire.encode(message), fd)

    def send_encoded(self, message: bytes, fd: int | None = None) -> None:
        if self._out < 0:
            return
        data = memoryview(message)
        self._queue.append((data, fd))
        self.unsent += len(data)
        self._flush()

    def _flush(self) -> None:
        while self._queue and self._out >= 0:
            data, fd = self._queue[0]
            try:
                if self._socket is None:
                    sent = os.write(self._out, data[: 1 << 20])
                elif fd is not None:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
                    sent = self._socket.sendmsg([data[:1024]], rights)
                    os.close(fd)
                    fd = None
                else:
                    sent = self._socket.send(data[: 1 << 20], socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                if not self._writing:
                    self._writing = True
                    self.loop.add_writer(self._out, self._flush)
                return
            except OSError:
                self._lost()
                return
            self.unsent -= sent
            if sent == len(data):
                self._queue.popleft()
            else:
                self._queue[0] = (data[sent:], fd)
        if self._writing:
            self._writing = False
            self.loop.remove_writer(self._out)
        self.resume_reading()

    # -- raw output

    def _read_raw(self, fd: int, rounds: int = ROUND) -> None:
        raw = self.raw[self._raw_fds[fd]]
        for _ in range(rounds):
            try:
                data = os.read(fd, READ)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data = b""
            if not data:
                self.loop.remove_reader(fd)
                return
            raw.feed(data)
        if raw.bytes > RAW_FREE:
            self.loop.remove_reader(fd)
            self.loop.call_later(RAW_PAUSE, self._read_raw_again, fd)

    def _read_raw_again(self, fd: int) -> None:
        if fd in self._raw_fds:
            self.loop.add_reader(fd, self._read_raw, fd)

    def take_raw(self) -> dict[str, tuple[str, int]]:
        """What has come past the streams since the last time: name -> (text, bytes)."""
        for fd in self._raw_fds:
            with contextlib.suppress(OSError, ValueError):
                self._read_raw(fd, 32)
        taken = {name: (raw.text(), raw.bytes) for name, raw in self.raw.items()}
        for raw in self.raw.values():
            raw.clear()
        return taken

    # -- life and death

    def cpu(self) -> float:
        """CPU seconds of the worker so far (kernel clock of the process)."""
        try:
            return time.clock_gettime(~(self.worker_pid or self.pid) * 8 + 2)
        except OSError:
            return 0.0

    def threads(self) -> int:
        """Of the worker; 0 where it cannot be seen."""
        if not self._group:
            return 0
        try:
            with open(f"/proc/{self.worker_pid or self.pid}/stat", "rb") as file:
                return int(file.read().rpartition(b")")[2].split()[17])
        except (OSError, ValueError, IndexError):
            return 0

    def allow_cpu(self, seconds: float) -> None:
        """The kernel's own limit on CPU time, for a host that is too busy to look: so much more
        from now on."""
        if self.worker_pid is not None:
            with contextlib.suppress(OSError, ValueError):
                hard = resource.prlimit(self.worker_pid, resource.RLIMIT_CPU)[1]
                soft = int(self.cpu() + seconds) + 1
                soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
                resource.prlimit(self.worker_pid, resource.RLIMIT_CPU, (soft, hard))

    def allow_memory(self, more: int) -> None:
        """Raise the worker's limit of address space (only the host can)."""
        if self.worker_pid is not None:
            with contextlib.suppress(OSError, ValueError):
                soft, hard = resource.prlimit(self.worker_pid, resource.RLIMIT_AS)
                if soft != resource.RLIM_INFINITY:
                    soft = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
                    resource.prlimit(self.worker_pid, resource.RLIMIT_AS, (soft, hard))

    def stop(self) -> None:
        """Nothing of the worker runs until `go`."""
        if self._group and not self.stopped:
            self.stopped = self._signal(signal.SIGSTOP)

    def go(self) -> None:
        if self.stopped:
            self.stopped = False
            self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self.killed = True
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> bool:
        if self.popen.returncode is not None:
            return False  # reaped: the number may be somebody else's by now
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            try:
                self.popen.send_signal(number)
            except OSError:
                return False
        return True

    def _lost(self) -> None:
        """The channel is closed: a worker that can no longer be spoken to is ended."""
        self.kill()

    def _exited(self) -> None:
        self.loop.remove_reader(self._pidfd)
        self.gate, self._gone = lambda: True, True
        self._last_words()

    def _last_words(self) -> None:
        """Read what it said last; the end comes after that."""
        if self._decoding or self._waits or self.ended.done():
            return  # called again when that is over
        self._receive(1 << 10)
        if self._decoding or self._waits:
            return
        self.popen.wait()
        if not self.ended.done():
            self.ended.set_result(self.popen.returncode)
        self.on_end()

    async def close(self) -> None:
        """Kill it, wait for its end, close every descriptor."""
        if not self.ended.done():
            self.kill()
            await asyncio.shield(self.ended)
        self.release()

    def release(self) -> None:
        """Close the descriptors (the process is dead)."""
        for fd in (self._in, *self._raw_fds, self._pidfd):
            if fd >= 0 and not self.loop.is_closed():
                self.loop.remove_reader(fd)
        if self._writing and not self.loop.is_closed():
            self.loop.remove_writer(self._out)
        if self._socket is not None:
            self._socket.close()
        else:
            for fd in (self._in, self._out):
                _close(fd)
        for fd in (*self._raw_fds, self._pidfd):
            _close(fd)
        for _, travelling in self._queue:
            if travelling is not None:
                os.close(travelling)
        self._queue.clear()
        self._socket, self._in, self._out, self._pidfd = None, -1, -1, -1
        self._raw_fds = {}
        self._reading = self._writing = False
        self.unsent = 0

    def how_it_ended(self) -> str:
        code = self.popen.returncode
        if code is None:
            return "it is still running"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"signal {-code} ({signal.Signals(-code).name})"
            return f"signal {-code}"
        return f"exit code {code}"


class Launch:
    """How a worker is started. `argv(fd)`: the command, given the number of the channel's
    descriptor (None: stdio).

    It starts in `/`: nothing that the loader or the interpreter looks for in the current folder is
    a cell's. The worker goes to its work folder once it has locked itself in.
    """

    def __init__(
        self,
        argv: Callable[[int | None], list[str]],
        env: dict[str, str],
        *,
        stdio: bool = False,
        group: bool = True,
    ):
        self.argv, self.env, self.stdio, self.group = argv, env, stdio, group


def _close(fd: int) -> None:
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)


def _decoded(line: bytes) -> dict[str, Any] | None:
    try:
        return wire.decode(line)
    except (wire.Bad, MemoryError):
        return None
