"""The worker's end of the private channel: frames of one JSON object a line, a thread that reads,
interrupts that wait.

A frame begins with a line feed as well as ending with one, so whatever else got onto the channel in
front of it is a line of its own, and is one bad frame to the host instead of the end of the
conversation.
"""

from __future__ import annotations

import _socket
from _thread import allocate_lock, start_new_thread
from os import _exit, read, write

from . import interrupts, jsonable

RIGHTS = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS)
SPARE = 1 << 20
CHUNK = 1 << 16  # below the size at which malloc maps memory anew for every read


class TooLarge(ValueError):
    """A message that does not fit into a frame."""


class Channel:
    """`handle(message, fd)` is called in the reading thread; None for the end of the channel."""

    def __init__(self, read_fd: int, write_fd: int):
        self.fds = (read_fd,) if read_fd == write_fd else (read_fd, write_fd)
        self.socket = read_fd == write_fd
        self.frame = 1 << 20
        if self.socket:
            sock = _socket.socket(fileno=read_fd)
            into = bytearray(CHUNK)  # once and for all: a cell may leave no memory to read into

            def receive(_size, ancillary):
                size, *rest = sock.recvmsg_into([into], ancillary)
                return memoryview(into)[:size], *rest

            self._receive = receive
            self._send_all = sock.sendall
        else:
            self._receive = lambda size, _: (read(read_fd, size), [], 0, None)
            self._send_all = lambda data: _write_all(write_fd, data)
        self._ancillary = _socket.CMSG_SPACE(4) if self.socket else 0
        self._buffer, self._searched, self._fds = bytearray(), 0, []
        self._lock = allocate_lock()
        self._spare: bytearray | None = None

    def encode(self, message: dict) -> bytes:
        """A message as the inside of a frame. Raises TooLarge."""
        data = jsonable.dumps(message)
        if len(data) > self.frame:
            raise TooLarge(f"{len(data):,} bytes as JSON; one message can hold {self.frame:,}")
        return data

    def write(self, data: bytes) -> None:
        """Send an encoded message. Not to be interrupted: callers are shielded, or outside of any
        cell."""
        with self._lock:
            self._send_all(b"\n" + data + b"\n")

    def send(self, message: dict) -> None:
        self.write(self.encode(message))

    def write_now(self, message: dict) -> None:
        """Send from the reading thread, if nobody else is sending: it must not wait, or no reply is
        read."""
        if self._lock.acquire(False):
            try:
                self._send_all(b"\n" + self.encode(message) + b"\n")
            finally:
                self._lock.release()

    def receive(self):
        """The next (message, fd or None); None at the end."""
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if end >= 0:
                line = bytes(memoryview(self._buffer)[:end])
                del self._buffer[: end + 1]
                self._searched = 0
                if not line:
                    continue
                message = jsonable.loads(line.decode("ascii"))
                return message, (self._fds.pop(0) if message.get("fd") and self._fds else None)
            self._searched = len(self._buffer)
            data, ancillary, _, _ = self._with_spare(self._receive, CHUNK, self._ancillary)
            if not data:
                return None
            for level, kind, payload in ancillary:
                if (level, kind) == RIGHTS:
                    self._fds.append(int.from_bytes(payload[:4], "little"))
            self._with_spare(self._buffer.extend, data)

    def _with_spare(self, function, *args):
        """Call it, once more where a cell has left no memory for it: some was put aside. An
        interrupt has to arrive."""
        try:
            return function(*args)
        except MemoryError:
            self._spare = None
            return function(*args)

    def read_for_ever(self, handle) -> None:
        """Start the reading thread, which takes no signals."""

        def loop():
            while True:
                try:
                    if self._spare is None:
                        self._spare = _spare()
                    received = self.receive()
                    if received is None:
                        break
                    handle(*received)
                except (OSError, MemoryError):
                    break
            # the host is gone, or the channel is, or nothing more can be heard: better dead than
            # deaf
            _exit(0)

        interrupts.block()
        start_new_thread(loop, ())
        interrupts.unblock()


def _spare() -> bytearray | None:
    try:
        return bytearray(SPARE)
    except MemoryError:
        return None


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[write(fd, view) :]
