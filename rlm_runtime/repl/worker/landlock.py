"""Landlock: which files the worker may touch, and no TCP, no signals to others. No privilege
needed, never undone."""

from __future__ import annotations

import ctypes
import os
import stat

from . import kernel

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = 1, 2, 4, 8, 16, 32
MAKE_DIR, MAKE_REG, REFER, TRUNCATE = 1 << 7, 1 << 8, 1 << 13, 1 << 14
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | 1 << 15
ALL_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # bits of an ABI; later ones add none
READ = READ_FILE | READ_DIR
SCRATCH = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | REFER | TRUNCATE
NEWEST = 7
NO_LOG = 1  # ABI 7: denials do not fill the audit log


class Attributes(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("tcp", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("fd", ctypes.c_int32)]


def abi() -> int:
    """The kernel's Landlock version. Raises OSError where there is none."""
    return min(kernel.call("landlock_create_ruleset", 0, 0, 1), NEWEST)


def restrict(rules: dict[str, int]) -> str:
    """Allow exactly `rules` (path -> rights) to this thread and those it starts; what to say about
    it.

    A path that does not exist is left out: there is nothing to allow. Raises OSError.
    """
    version = abi()
    handled = (1 << ALL_FILE_RIGHTS[min(version, 5)]) - 1
    attributes = Attributes(handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = kernel.call("landlock_create_ruleset", ctypes.byref(attributes), size, 0)
    try:
        for path, rights in rules.items():
            _allow(ruleset, path, rights & handled)
        kernel.call("landlock_restrict_self", ruleset, NO_LOG if version >= 7 else 0)
    finally:
        os.close(ruleset)
    what = "files" + (", TCP" if version >= 4 else "") + (", signals" if version >= 6 else "")
    return f"active (ABI {version}: {what})"


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= FILE_RIGHTS
        kernel.call("landlock_add_rule", ruleset, 1, ctypes.byref(Beneath(rights, fd)), 0)
    finally:
        os.close(fd)
