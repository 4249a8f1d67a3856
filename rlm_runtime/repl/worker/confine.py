"""The worker locks itself in, layer by layer, before it has seen a line of anybody's code, and
tries every lock.

Nothing here needs a privilege, and nothing can be undone from inside. A layer that cannot be had is
reported and left out; whether that is acceptable is the host's decision, not ours.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys

from . import filter as seccomp
from . import kernel, landlock

SYSTEM_FILES = (
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
    "/etc/ld.so.cache",
    "/usr/share/zoneinfo",
    "/sys/devices/system/cpu/online",
    "/sys/devices/system/cpu/possible",
)
SITE = ("site-packages", "dist-packages")
CAPABILITY_VERSION = 0x20080522
SECURE_BITS = 0x2F  # root is nobody special, and stays so


class Missing(Exception):
    """A layer that is not there, and why."""


def confine(spec: dict) -> dict[str, str]:
    """Go through the layers; layer -> "active (...)", "off" or "missing: why"."""
    layers: dict[str, str] = {}
    extra = _close_inherited(spec["protocol"])
    before = _address_space()
    rules = _rules(spec)  # while files can still be listed
    forbidden = _forbidden(spec, rules)

    def layer(name, apply):
        try:
            layers[name] = apply()
        except (OSError, ValueError, Missing) as error:
            layers[name] = f"missing: {error}"

    layer("environment", lambda: _environment(spec))
    layer(
        "descriptors", lambda: f"active (protocol only{', closed ' + str(extra) if extra else ''})"
    )
    layer("limits", lambda: _limits(spec, before))
    if not spec["confine"]:
        _die_with_host(spec)
        return layers | {"privileges": "off", "landlock": "off", "seccomp": "off"}
    layer("privileges", _drop_privileges)
    _die_with_host(spec)
    layer("landlock", lambda: landlock.restrict(rules))
    truncate = "active" in layers["landlock"] and landlock.abi() >= 3
    _stand_ins()
    layer("seccomp", lambda: seccomp.confine(tuple(spec["protocol"]), spec["socket"], truncate))
    checks = {
        "landlock": lambda: _try_files(*forbidden),
        "seccomp": _try_calls,
        "limits": _try_limits,
    }
    for name, check in checks.items():
        if layers[name].startswith("active") and (
            name != "limits" or layers["seccomp"].startswith("active")
        ):
            try:
                check()
            except Missing as hole:
                layers[name] = f"missing: it was set up, yet {hole}"
    return layers


def _environment(spec: dict) -> str:
    if spec["scrub"]:
        for name in set(os.environ) - set(spec["environment"]):
            del os.environ[name]
    unknown = sorted(set(os.environ) - set(spec["environment"]))
    if unknown:
        raise Missing(f"variables nobody asked for: {', '.join(unknown)[:200]}")
    return "scrubbed"


def _close_inherited(protocol: list[int]) -> int:
    """Close what came along besides the standard three and the protocol; how many."""
    keep, closed = {0, 1, 2, *protocol}, 0
    try:
        found = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        found = range(256)
    for fd in found:
        if fd not in keep:
            try:
                os.close(fd)
                closed += 1
            except OSError:
                pass  # the descriptor of the listing itself
    return closed


def _address_space() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return 64 << 20


# -- what the filter refuses and Python's library asks for


def _stand_ins() -> None:
    """`os.uname` without the name of the machine, and a `realpath` that takes a link it may not
    read for a folder."""
    system, _node, *rest = os.uname()
    uname = os.uname_result((system, "rlm", *rest))
    os.uname = sys.modules["posix"].uname = lambda: uname
    real = os.path.realpath

    def realpath(filename, *, strict=False):
        """As `os.path.realpath`; links are not followed in this REPL."""
        try:
            return real(filename, strict=strict)
        except PermissionError:
            if strict:
                raise
            return os.path.abspath(filename)

    os.path.realpath = realpath


# -- limits


def _limits(spec: dict, before: int) -> str:
    memory = before + spec["memory"]
    # The soft limit binds, since the filter refuses to change limits; the hard one stays so that
    # the host can make room for another context. Without the filter, both bind.
    _limit(resource.RLIMIT_AS, memory, memory if not spec["confine"] else None)
    _limit(resource.RLIMIT_FSIZE, spec["file_size"])
    _limit(resource.RLIMIT_NOFILE, spec["files"])
    # A core of 1 byte is none, even where the kernel pipes cores to a program whatever the limit
    # says.
    _limit(resource.RLIMIT_CORE, 0 if os.geteuid() == 0 else 1)
    for name in ("RLIMIT_MSGQUEUE", "RLIMIT_MEMLOCK", "RLIMIT_RTPRIO", "RLIMIT_NICE"):
        if hasattr(resource, name):
            _limit(getattr(resource, name), 0)
    if hasattr(resource, "RLIMIT_SIGPENDING"):  # signals that wait take memory of the kernel
        _limit(resource.RLIMIT_SIGPENDING, 256)
    if spec.get("processes") is not None:
        _limit(resource.RLIMIT_NPROC, spec["processes"])
    return f"active (memory {spec['memory'] >> 20} MiB, files {spec['file_size'] >> 20} MiB, {spec['files']} descriptors)"


def _limit(which: int, soft: int, hard: int | None = -1) -> None:
    """`hard` None: leave it as it is; by default the same as `soft`."""
    ceiling = resource.getrlimit(which)[1]
    if ceiling != resource.RLIM_INFINITY:
        soft = min(soft, ceiling)
    resource.setrlimit(which, (soft, ceiling if hard is None else soft))


def _try_limits() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    except (OSError, ValueError):
        return
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    raise Missing("a limit could be raised")


# -- privileges


def _drop_privileges() -> str:
    """No new privileges by exec, and no capability left, in no set: root in here is an ordinary
    user."""
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    held = _capabilities()
    if any(held):
        try:
            kernel.prctl(kernel.PR_SET_SECUREBITS, SECURE_BITS)
            for capability in range(64):
                try:
                    kernel.prctl(kernel.PR_CAPBSET_DROP, capability)
                except OSError:
                    break  # the kernel's last one is behind us
            kernel.prctl(kernel.PR_CAP_AMBIENT, 4)
        except OSError:
            # without CAP_SETPCAP only the sets below can be emptied, and without exec that is
            # enough
            pass
        header, data = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
        kernel.call("capset", ctypes.byref(header), ctypes.byref(data))
    if os.geteuid() == 0:
        # an ordinary user's host could not see the open files then
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    if any(_capabilities()):
        raise Missing("capabilities could not be dropped")
    if kernel.prctl(kernel.PR_GET_NO_NEW_PRIVS) != 1:
        raise Missing("no_new_privs is not set")
    return f"active (no_new_privs, {'all capabilities dropped' if any(held) else 'no capability held'})"


def _capabilities() -> list[int]:
    header, data = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    kernel.call("capget", ctypes.byref(header), ctypes.byref(data))
    return list(data)


def _die_with_host(spec: dict) -> None:
    """No worker outlives its host, however that one ends. (A worker that is stopped does not see
    the closed socket.)"""
    parent = spec.get("parent")
    if parent is None:
        return
    try:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, 9)
    except OSError:
        return
    if os.getppid() != parent:  # it died before we asked
        os._exit(0)


# -- files


def _rules(spec: dict) -> dict[str, int]:
    """Path -> rights. The standard library without the packages in it, shared libraries, what the
    host allows."""
    rules = {path: landlock.READ for path in SYSTEM_FILES}
    rules["/dev/null"] = landlock.READ | landlock.WRITE_FILE
    stdlib = os.path.dirname(os.path.realpath(os.__file__))
    for folder in {stdlib, *(p for p in sys.path if os.path.isdir(p))}:
        rules |= _library(folder)
    rules |= _shared_libraries()
    rules |= {
        path: landlock.READ for path in (os.path.dirname(__file__), spec["inbox"], *spec["read"])
    }
    rules |= {path: landlock.READ_DIR for path in spec["packages"]["sites"] if path not in rules}
    rules |= {path: landlock.READ for path in spec["packages"]["paths"]}
    rules[spec["scratch"]] = landlock.SCRATCH
    return rules


def _library(folder: str) -> dict[str, int]:
    """All of a library folder; where packages are installed inside it, everything beside them (and
    names only there)."""
    names = os.listdir(folder)
    if not any(site in names for site in SITE):
        return {folder: landlock.READ}
    rules = {folder: landlock.READ_DIR}
    return rules | {os.path.join(folder, name): landlock.READ for name in names if name not in SITE}


def _shared_libraries() -> dict[str, int]:
    """Where shared libraries live: an architecture's own folder whole, any other folder its
    libraries only."""
    machine = os.uname().machine
    rules = {
        path: landlock.READ
        for path in ("/lib64", "/usr/lib64")
        if not os.path.isdir(path + "/python3")
    }
    rules |= {
        f"{root}/{machine}-linux-{libc}": landlock.READ
        for root in ("/lib", "/usr/lib")
        for libc in ("gnu", "musl")
    }
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            loaded = {line.split(maxsplit=5)[-1].strip() for line in file if ".so" in line}
    except OSError:
        loaded = set()
    for folder in {os.path.dirname(path) for path in loaded if path.startswith("/")} - set(rules):
        try:
            names = [name for name in os.listdir(folder) if ".so" in name][:2000]
        except OSError:
            continue
        rules |= {os.path.join(folder, name): landlock.READ for name in names}
    return rules


# -- trying the locks


def _forbidden(spec: dict, rules: dict[str, int]) -> tuple[list[str], list[str], str]:
    """Files that must not be readable, folders that must not be listable, a file that must not be
    made: outside of what the host allows, which may be all of /etc."""
    allowed = [
        os.path.realpath(path) for path, rights in rules.items() if rights & landlock.READ_FILE
    ]

    def beneath(path: str) -> bool:
        path = os.path.realpath(path)
        return any(path == top or path.startswith(top.rstrip("/") + "/") for top in allowed)

    files = [
        path for path in (spec["canary"], "/proc/self/environ", "/etc/passwd") if not beneath(path)
    ]
    folders = [path for path in ("/", os.path.dirname(spec["canary"])) if not beneath(path)]
    return files, folders, f"{spec['canary']}.{os.urandom(8).hex()}"


def _try_files(files: list[str], folders: list[str], new: str) -> None:
    for path in files:
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        except OSError:
            continue
        raise Missing(f"{path} could be read")
    for path in folders:
        try:
            os.listdir(path)
        except OSError:
            continue
        raise Missing(f"{path} could be listed")
    try:
        os.close(os.open(new, os.O_CREAT | os.O_WRONLY, 0o600))
    except OSError:
        pass
    else:
        raise Missing("a file could be written outside the work folder")


def enter(scratch: str) -> str | None:
    """Go to the work folder, in which no cell has been yet; what is wrong with it. Not a matter of
    any layer."""
    probe = os.path.join(scratch, os.urandom(16).hex())
    try:
        os.chdir(scratch)
        with open(probe, "xb") as file:
            file.write(b"x")
        os.unlink(probe)
    except OSError as error:
        return f"it cannot be written: {error.strerror}."
    if "PWD" in os.environ:
        os.environ["PWD"] = scratch
    return None


def _try_calls() -> None:
    import _socket

    for family in (
        _socket.AF_INET,
        _socket.AF_UNIX,
        getattr(_socket, "AF_NETLINK", _socket.AF_INET),
    ):
        try:
            _socket.socket(family, _socket.SOCK_DGRAM).close()
        except PermissionError:
            continue
        except OSError as error:
            raise Missing(f"socket() answers {error} instead of being refused") from None
        raise Missing("a socket could be made")
    try:
        child = os.fork()
    except OSError:
        pass
    else:
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        raise Missing("a process could be forked")
    try:
        os.execv("/rlm/nothing/here", ["nothing"])
    except OSError as error:
        if error.errno != seccomp.EPERM:
            raise Missing(f"exec answers {error} instead of being refused") from None
    try:
        os.kill(os.getppid(), 0)
    except OSError:
        pass
    else:
        raise Missing("the parent could be signalled")
    if kernel.MACHINE == "x86_64" and not kernel.raw(seccomp.X32 + 39):
        raise Missing("x32 system calls go through")
