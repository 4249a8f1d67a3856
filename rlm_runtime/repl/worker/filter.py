"""The seccomp filter: an allow-list of system calls for CPython, its threads and numpy; everything
else is EPERM.

The filter is written as BPF by hand, since libseccomp may not be there. Words of other
architectures and x32 numbers are refused first: the same number means another call there. Calls
newer than our table get ENOSYS, like a kernel that does not know them, so that libc takes its older
path (clone3 too: its flags lie in memory, where a filter cannot look).
"""

from __future__ import annotations

import ctypes
import os

from . import kernel, syscalls

ALLOW, ERRNO = 0x7FFF0000, 0x00050000
EPERM, EINVAL, ENOLCK, ENOSYS, ENOTSUP = 1, 22, 37, 38, 95
LOAD, JEQ, JGT, JGE, RETURN = 0x20, 0x15, 0x25, 0x35, 0x06
NUMBER, ARCH, ARGS = 0, 4, 16  # offsets in struct seccomp_data
X32 = 0x40000000
MODE_FILTER, TSYNC = 1, 1

# clone flags of a new thread, by glibc and by musl; a process has others
PTHREAD = (0x003D0F00, 0x007D0F00)
# getters, and the names of threads and memory areas
PR_ALLOWED = (2, 3, 15, 16, 21, 23, 39, 0x53564D41)
FCNTL_ALLOWED = (0, 1, 2, 3, 4, 5, 1030, 1032)  # no F_SETOWN: it sends signals to others
# Locks take memory of the kernel, and one on the user's file would keep others from it. A process
# alone with its files has every POSIX lock it asks for: those are granted and not made. The other
# kinds would be in its own way.
FCNTL_GRANTED, FCNTL_NO_LOCKS = (6, 7), (36, 37, 38)
CLOCKS = 16  # clocks of everybody; a larger (negative) number is the processor time of any process
# is it a terminal, how big, how much to read, flags
IOCTL_ALLOWED = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
SIGXCPU = 24

FREE = """
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 futex mmap munmap mprotect mremap madvise
    brk lseek open openat stat fstat lstat newfstatat statx access faccessat faccessat2 getcwd chdir
    fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 ftruncate fsync fdatasync
    sync_file_range getdents getdents64 msync futex_waitv set_robust_list rseq
    set_tid_address exit exit_group sched_yield sched_getaffinity sched_getparam sched_getscheduler
    sched_get_priority_max sched_get_priority_min nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time
    times getrusage getitimer setitimer alarm pause poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl
    epoll_wait epoll_pwait epoll_pwait2 pipe pipe2 eventfd2 getpid gettid getppid getuid geteuid getgid getegid
    getresuid getresgid getgroups getpgrp getpgid getsid getrandom getcpu rt_sigprocmask rt_sigreturn
    rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack restart_syscall getrlimit membarrier umask fstatfs
    copy_file_range sendfile fadvise64 wait4 waitid get_mempolicy capget close dup
""".split()  # noqa: SIM905
# of this process, of no other
OWN = ("getpgid", "getsid", "sched_getaffinity", "sched_getparam", "sched_getscheduler")
# answered with ENOSYS: libc and Python then take the older call
UNKNOWN = ("clone3", "openat2", "close_range")
# fallocate takes room on the disk faster than anybody can look; libc writes zeros instead.
UNSUPPORTED = (
    "fallocate",
    "getxattr",
    "lgetxattr",
    "fgetxattr",
    "listxattr",
    "llistxattr",
    "flistxattr",
)


def rules(
    pid: int, protocol: tuple[int, ...], socket: bool, truncate: bool
) -> dict[str, list[tuple]]:
    """What each system call is answered with: name -> BPF instructions (code, jump if true, jump if
    false, value).

    `protocol`: descriptors of the private channel, which only its own calls may use when it is a
    `socket`: a cell that writes to, reads from or closes every number it can think of does not meet
    it. `truncate`: whether Landlock watches truncate(2), which takes a path.
    """
    rules: dict[str, list[tuple]] = {name: [_ret(ALLOW)] for name in FREE}
    rules |= {name: [*_only(0, (0, pid))[:-1], _ret(ERRNO | ENOSYS)] for name in OWN}
    rules |= {
        name: _below(0, CLOCKS) for name in ("clock_gettime", "clock_getres", "clock_nanosleep")
    }
    rules |= {name: [_ret(ERRNO | ENOSYS)] for name in UNKNOWN}
    rules |= {name: [_ret(ERRNO | ENOTSUP)] for name in UNSUPPORTED}
    if truncate:
        rules["truncate"] = [_ret(ALLOW)]
    guarded = ["close", "dup", "dup2", "dup3"] + (
        ["read", "write", "readv", "writev", "sendfile"] if socket else []
    )
    for name in guarded:
        rules[name] = (
            _refuse(0, protocol)
            + (_refuse(1, protocol) if name in ("dup2", "dup3") else [])
            + [_ret(ALLOW)]
        )
    locks = _refuse(1, FCNTL_GRANTED, 0) + _refuse(1, FCNTL_NO_LOCKS, ENOLCK)
    rules["fcntl"] = _refuse(0, protocol) + locks + _only(1, FCNTL_ALLOWED)
    rules["flock"] = [_ret(ERRNO | ENOLCK)]
    # a channel that no longer blocks ends the worker
    rules["ioctl"] = _refuse(0, protocol) + _only(1, IOCTL_ALLOWED)
    rules["prctl"] = _only(0, PR_ALLOWED)
    rules["clone"] = _only(0, PTHREAD)
    rules["kill"] = rules["tgkill"] = _only(0, (pid,))
    rules["prlimit64"] = _refuse_unless_null(2) + _only(0, (0, pid))
    rules["rt_sigaction"] = [*_refuse(0, (SIGXCPU,)), _ret(ALLOW)]
    if socket:
        rules["sendto"] = _refuse_unless_null(4) + _only(0, protocol)
        rules["recvfrom"] = rules["recvmsg"] = _only(0, protocol)
    return rules


def open_calls(machine: str, rules: dict[str, list[tuple]]) -> list[str]:
    """Names of the system calls that go through to the kernel, with some arguments at least."""
    return [
        name
        for name, body in rules.items()
        if _ret(ALLOW) in body and syscalls.number(name, machine) is not None
    ]


def program(
    machine: str, pid: int, protocol: tuple[int, ...], socket: bool, truncate: bool
) -> list[tuple]:
    """The whole filter: BPF instructions, see `rules`."""
    return _program(machine, rules(pid, protocol, socket, truncate))


def _program(machine: str, rules: dict[str, list[tuple]]) -> list[tuple]:
    code = [
        (LOAD, 0, 0, ARCH),
        (JEQ, 1, 0, syscalls.MACHINES[machine][1]),
        _ret(ERRNO | EPERM),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        code += [(JGE, 0, 1, X32), _ret(ERRNO | EPERM)]
    for name, body in rules.items():
        number = syscalls.number(name, machine)
        if number is not None:
            code += [(JEQ, 0, len(body), number), *body]
    newest = syscalls.NEWEST[syscalls.MACHINES[machine][0]]
    return [*code, (JGT, 0, 1, newest), _ret(ERRNO | ENOSYS), _ret(ERRNO | EPERM)]


def _ret(action: int) -> tuple:
    return (RETURN, 0, 0, action)


def _refuse(arg: int, values: tuple[int, ...], error: int = EPERM) -> list[tuple]:
    """An error (0: as if it was done) where the low word of an argument is one of these (the kernel
    reads descriptors as 32 bits)."""
    code = [(LOAD, 0, 0, ARGS + 8 * arg)]
    for value in values:
        code += [(JEQ, 0, 1, value), _ret(ERRNO | error)]
    return code


def _below(arg: int, limit: int) -> list[tuple]:
    return [(LOAD, 0, 0, ARGS + 8 * arg), (JGE, 0, 1, limit), _ret(ERRNO | EINVAL), _ret(ALLOW)]


def _only(arg: int, values: tuple[int, ...]) -> list[tuple]:
    code = [(LOAD, 0, 0, ARGS + 8 * arg)]
    for value in values:
        code += [(JEQ, 0, 1, value), _ret(ALLOW)]
    return [*code, _ret(ERRNO | EPERM)]


def _refuse_unless_null(arg: int) -> list[tuple]:
    refuse = (JEQ, 1, 0, 0), _ret(ERRNO | EPERM)
    return [(LOAD, 0, 0, ARGS + 8 * arg), *refuse, (LOAD, 0, 0, ARGS + 8 * arg + 4), *refuse]


class Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_ushort),
        ("jt", ctypes.c_ubyte),
        ("jf", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    ]


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("first", ctypes.POINTER(Instruction))]


def install(code: list[tuple]) -> None:
    """Put the filter on every thread of this process, for good. Raises OSError."""
    array = (Instruction * len(code))(*(Instruction(*line) for line in code))
    program_ = Program(len(code), ctypes.cast(array, ctypes.POINTER(Instruction)))
    thread = kernel.call("seccomp", MODE_FILTER, TSYNC, ctypes.byref(program_))
    if thread:
        raise OSError(EPERM, f"seccomp: thread {thread} did not take the filter")


def confine(protocol: tuple[int, ...], socket: bool, truncate: bool) -> str:
    """Install the filter for this process; what to say about it. Raises OSError."""
    if kernel.MACHINE not in syscalls.MACHINES:
        raise OSError(ENOSYS, f"no system call table for {kernel.MACHINE}")
    chosen = rules(os.getpid(), protocol, socket, truncate)
    install(_program(kernel.MACHINE, chosen))
    count = len(open_calls(kernel.MACHINE, chosen))
    return f"active ({kernel.MACHINE}: no sockets, no new processes, {count} calls allowed)"
