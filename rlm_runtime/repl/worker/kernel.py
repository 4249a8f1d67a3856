"""Raw system calls for the confinement: one place that knows how ctypes talks to libc."""

from __future__ import annotations

import ctypes
import os

from . import syscalls

MACHINE = os.uname().machine
try:
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.syscall.restype = ctypes.c_long
except OSError as error:  # no dynamic libc: nothing here can work, and the confinement says so
    _libc, _why = None, str(error)

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_SECUREBITS = 1, 4, 24, 28
PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 38, 39, 47


def call(name: str, *args) -> int:
    """The result of a system call. Raises OSError as the kernel answers, also for a machine without
    a table."""
    if _libc is None:
        raise OSError(38, f"no libc to call: {_why}")
    if MACHINE not in syscalls.MACHINES:
        raise OSError(38, f"no system call table for {MACHINE}")
    return _checked(
        _libc.syscall(ctypes.c_long(syscalls.number(name, MACHINE)), *(_wide(a) for a in args)),
        name,
    )


def raw(number: int, *args) -> int:
    """errno (positive) of a system call by number, 0 where it went through."""
    return (
        ctypes.get_errno()
        if _libc.syscall(ctypes.c_long(number), *(_wide(a) for a in args)) == -1
        else 0
    )


def prctl(option: int, *args) -> int:
    if _libc is None:
        raise OSError(38, f"no libc to call: {_why}")
    padded = [*args, 0, 0, 0, 0][:4]
    return _checked(
        _libc.prctl(ctypes.c_int(option), *(_wide(a) for a in padded)), f"prctl {option}"
    )


def shared(path: str, size: int) -> memoryview | None:
    """A file's bytes in memory, shared with whoever else looks at the file, and without a
    descriptor kept open."""
    if _libc is None:
        return None
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        _libc.mmap.restype = ctypes.c_void_p
        _libc.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        ]
        address = _libc.mmap(None, size, 3, 1, fd, 0)  # read and write, shared
    finally:
        os.close(fd)
    if address in (None, ctypes.c_void_p(-1).value):
        return None
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def _wide(value):
    return ctypes.c_ulong(value) if isinstance(value, int) else value


def _checked(result: int, name: str) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result
