"""Nothing of the host can be read: files, environment, memory, descriptors, other runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rlm.attacks.arena import REPOSITORY, ROOT, X86, Arena, attack, names, probe

READ = "return open({!r}, 'rb').read(100)"
FILES = {
    "passwd": ("/etc/passwd", True),
    "shadow": ("/etc/shadow", ROOT),
    "hosts": ("/etc/hosts", True),
    "machine id": ("/etc/os-release", True),
    "file of the user": ("@GUARD@/secret.txt", True),
    "repository": ("@REPO@/pyproject.toml", True),
    "host's environment": ("/proc/@HOST@/environ", True),
    "host's arguments": ("/proc/@HOST@/cmdline", True),
    "host's memory map": ("/proc/@HOST@/maps", True),
    "victim's environment": ("/proc/@VICTIM@/environ", True),
    "own environment": ("/proc/self/environ", True),
    "own arguments": ("/proc/self/cmdline", True),
    "own status": ("/proc/self/status", True),
    "own maps": ("/proc/thread-self/maps", True),
    "own mounts": ("/proc/self/mountinfo", True),
    "root by proc": ("/proc/self/root/etc/passwd", True),
    "host's root": ("/proc/@HOST@/root/etc/passwd", True),
    "host's folder": ("/proc/@HOST@/cwd/pyproject.toml", False),
    "host's open file": ("/proc/@HOST@/fd/0", False),
    "init": ("/proc/1/cmdline", True),
    "kernel command line": ("/proc/cmdline", True),
    "network tables": ("/proc/net/tcp", True),
    "kernel memory": ("/proc/kcore", False),
    "physical memory": ("/dev/mem", False),
    "ports": ("/dev/port", False),
    "kernel messages": ("/dev/kmsg", False),
    "dots": ("../../../../../../../etc/passwd", True),
    "dots by the work folder": ("./../canary", True),
    "memory shared with the host": ("../said", True),
    "double slash": ("//etc//passwd", True),
    "terminal": ("/dev/tty", False),
    "library of the site": (
        os.path.join(
            os.path.dirname(os.path.dirname(__import__("pydantic").__file__)), "pydantic", "main.py"
        ),
        True,
    ),
}
FOLDERS = (
    "/",
    "/etc",
    "/root",
    "/home",
    "/tmp",
    "/proc",
    "/proc/self/fd",
    "/proc/@HOST@/fd",
    "/proc/@HOST@/task",
    "/sys",
    "/dev",
    "/dev/shm",
    "/run",
    "/var/log",
    "@REPO@",
    "@HOME@",
    "@GUARD@",
    "..",
    "../inbox/..",
)
WRITES = (
    "/tmp/written-@TOKEN@",
    "@HOME@/written-@TOKEN@",
    "@REPO@/written-@TOKEN@",
    "@GUARD@/written-@TOKEN@",
    "/dev/shm/written-@TOKEN@",
    "../written-@TOKEN@",
    "../inbox/written-@TOKEN@",
)

PROBES = [probe(f"read {name}", READ.format(path), bites) for name, (path, bites) in FILES.items()]
PROBES += [
    probe(
        f"list {path}",
        f"return os.listdir({path!r})",
        os.access(path, os.R_OK) and path[0] == "/" and path != "/dev/shm",
    )
    for path in FOLDERS
]
PROBES += [
    probe(
        f"write {path}",
        f"fd = os.open({path!r}, os.O_CREAT | os.O_WRONLY, 0o600)\nreturn 'made'",
        False,
    )
    for path in WRITES
]
PROBES += [
    probe("symbolic link", "os.symlink('@GUARD@/secret.txt', 'link')\nreturn open('link').read()"),
    probe(
        "symbolic link by number",
        "sc(88, b'@GUARD@/secret.txt', b'link2')\nreturn open('link2').read()",
        X86,
    ),
    probe("hard link", "os.link('@GUARD@/secret.txt', 'hard')\nreturn open('hard').read()"),
    probe(
        "hard link of the context",
        "import glob\nos.link(glob.glob('../inbox/*/*')[0], 'hard2')\nreturn 'linked'",
        False,
    ),
    probe(
        "folder descriptor",
        "top = os.open('/etc', os.O_RDONLY | os.O_DIRECTORY)\nreturn os.read(os.open('passwd', 0, dir_fd=top), 9)",
    ),
    probe(
        "path descriptor",
        "top = os.open('/', os.O_PATH)\nreturn os.read(os.open('etc/passwd', 0, dir_fd=top), 9)",
    ),
    probe(
        "path descriptor of a file, opened again",
        "fd = os.open('@GUARD@/secret.txt', os.O_PATH)\nreturn open(f'/proc/self/fd/{fd}').read()",
    ),
    probe(
        "path descriptor read", "return os.read(os.open('@GUARD@/secret.txt', os.O_PATH), 9)", False
    ),
    probe(
        "empty path of a path descriptor",
        "fd = os.open('@GUARD@/secret.txt', os.O_PATH)\nreturn sc(257, fd, b'', 0, 0)",
        False,
    ),
    probe(
        "change folder",
        "os.chdir('/etc')\ntry:\n    return open('passwd').read(9)\nfinally:\n    os.chdir(os.environ['HOME'])",
    ),
    probe(
        "file handle",
        "handle = ctypes.create_string_buffer(struct.pack('Ii', 128, 0) + bytes(128))\nmount = ctypes.c_int()\n"
        "sc(303, -100, b'/etc/passwd', handle, ctypes.byref(mount), 0)\ntop = os.open('/', os.O_PATH)\nreturn sc(304, top, handle, 0)",
        False,
    ),
    probe(
        "openat2",
        "how = ctypes.create_string_buffer(24)\nreturn sc(437, -100, b'/etc/passwd', how, 24)",
        X86,
    ),
    probe("creat", "return sc(85, b'/tmp/written-@TOKEN@', 0o600)", False),
    probe(
        "mmap",
        "import mmap\nwith open('/etc/passwd') as f:\n    return mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[:9]",
    ),
    probe(
        "libc fopen",
        "_libc.fopen.restype = ctypes.c_void_p\nif not _libc.fopen(b'/etc/passwd', b'r'):\n    raise OSError('null')\nreturn 'open'",
    ),
    probe(
        "sqlite",
        "import sqlite3\nc = sqlite3.connect('file:@GUARD@/x.db?mode=ro', uri=True)\nc.execute('select 1 from sqlite_master')",
        False,
    ),
    probe(
        "sqlite attach",
        "import sqlite3\nc = sqlite3.connect(':memory:')\nc.execute(\"attach '@GUARD@/y.db' as y\")\nc.execute('create table y.t(a)')\nos.unlink('@GUARD@/y.db')\nreturn 'made'",
    ),
    probe(
        "shutil",
        "import shutil\nshutil.copy('/etc/passwd', 'copied')\nreturn open('copied').read(9)",
    ),
    probe(
        "sendfile",
        "out = open('out', 'wb')\nos.sendfile(out.fileno(), os.open('/etc/passwd', 0), 0, 99)\nreturn 'sent'",
    ),
    probe(
        "move into the work folder",
        "os.rename('@GUARD@/secret.txt', 'mine')\nos.rename('mine', '@GUARD@/secret.txt')\nreturn 'moved'",
    ),
    probe("remove a file of the host", "os.unlink('@GUARD@/secret.txt')\nreturn 'gone'", False),
    probe("truncate by path", "os.truncate('@GUARD@/secret.txt', 0)\nreturn 'cut'", False),
    probe("change the mode", "os.chmod('@GUARD@/secret.txt', 0o600)\nreturn 'changed'", True),
    probe("change the owner", "os.chown('@GUARD@/secret.txt', -1, -1)\nreturn 'changed'", True),
    probe(
        "change the times",
        "os.utime('@GUARD@/module_of_the_host.py', None)\nreturn 'changed'",
        True,
    ),
    probe(
        "extended attributes",
        "os.setxattr('@GUARD@/secret.txt', 'user.a', b'b')\nreturn 'set'",
        False,
    ),
    probe("named pipe", "os.mkfifo('pipe')\nos.unlink('pipe')\nreturn 'made'"),
    probe("device", "os.mknod('disk', 0o60600, os.makedev(8, 0))\nreturn 'made'", False),
    probe("make a folder outside", "os.mkdir('@GUARD@/d')\nos.rmdir('@GUARD@/d')\nreturn 'made'"),
    probe(
        "watch a folder",
        "fd = _libc.inotify_init()\nif fd < 0 or _libc.inotify_add_watch(fd, b'/tmp', 0xfff) < 0:\n    raise OSError('no')\nreturn 'watching'",
    ),
    probe(
        "import from the host",
        "import importlib.util as u\ns = u.spec_from_file_location('m', '@GUARD@/module_of_the_host.py')\nm = u.module_from_spec(s)\ns.loader.exec_module(m)\nreturn m.TOKEN",
    ),
    probe("load a library by path", "import glob\nreturn ctypes.CDLL('@GUARD@/lib.so')", False),
    probe(
        "line cache",
        "import linecache\nlinecache.clearcache()\nif not linecache.getlines('/etc/passwd'):\n    raise OSError('no lines')\nreturn 'read'",
    ),
    probe(
        "password database",
        "import pwd\ntry:\n    return pwd.getpwuid(0).pw_dir\nexcept KeyError:\n    raise OSError('nobody is known')",
    ),
    probe("pseudo terminal", "import pty\nreturn pty.openpty()"),
    probe(
        "steal a descriptor of the host",
        "return sc(438, int(sc(434, @HOST@, 0).split()[-1]), 0, 0)",
        X86,
    ),
    probe("pidfd of the host", "return os.pidfd_open(@HOST@)"),
    probe(
        "memory by call",
        "import ctypes as c\nb = c.create_string_buffer(8)\niov = (c.c_ulong * 2)(c.addressof(b), 8)\nfar = (c.c_ulong * 2)(0x400000, 8)\nreturn sc(310, @HOST@, iov, 1, far, 1, 0)",
        False,
    ),
    probe(
        "write memory by call",
        "import ctypes as c\nb = c.create_string_buffer(8)\niov = (c.c_ulong * 2)(c.addressof(b), 8)\nreturn sc(311, @VICTIM@, iov, 1, iov, 1, 0)",
        False,
    ),
    probe("trace the victim", "return sc(101, 0x4206, @VICTIM@, 0, 0)", False),  # PTRACE_SEIZE
    probe("trace the host", "return sc(101, 16, @HOST@, 0, 0)", False),
    probe("be traced", "return sc(101, 0, 0, 0, 0)", False),
    probe("memory by file", "return os.open('/proc/@HOST@/mem', os.O_RDONLY)"),
    probe("own memory by file", "return os.open('/proc/self/mem', os.O_RDWR)"),
    probe("compare kernel objects", "return sc(312, os.getpid(), @HOST@, 0, 0, 0)", False),
    probe("kernel log", "b = ctypes.create_string_buffer(100)\nreturn sc(103, 3, b, 100)", ROOT),
    probe("memory of no file", "return os.memfd_create('x')"),
    probe("shared memory segment", "return sc(29, 0, 4096, 0o1600)", False),
    probe("message queue", "return sc(240, b'rlm-attack', 0o100 | 2, 0o600, 0)", False),
    probe("disk quota", "return sc(179, 0x800001 << 8, 0, 0, 0)", False),
    probe("name of the parent's program", "return os.readlink('/proc/@HOST@/exe')"),
    probe("folder of the parent", "return os.readlink('/proc/@HOST@/cwd')"),
]


@pytest.mark.parametrize("what", PROBES, ids=names(PROBES))
def test_refused(arena, what):
    arena.play(what)


BITING = [p for p in PROBES if p.bites]


@pytest.mark.parametrize("what", BITING, ids=names(BITING))
def test_bites_without_a_sandbox(open_arena, what):
    result = open_arena.run(what.cells[0])
    assert "BREACH" in result.stdout, result


def test_no_secret_in_the_environment(arena):
    cell = """
    _libc.getenv.restype = ctypes.c_char_p
    print(_libc.getenv(b"RLM_ATTACKS_API_KEY"), sorted(os.environ))
    environ = ctypes.POINTER(ctypes.c_char_p).in_dll(_libc, "environ")
    for i in range(100):
        if environ[i] is None:
            break
        print(environ[i])
    """
    (result,) = arena.play(attack("environment", cell, ends="ok"))
    assert arena.host.token not in result.stdout and "None [" in result.stdout


SCAN = """
import os, stat
for fd in range(1024):
    try:
        status = os.fstat(fd)
    except OSError:
        continue
    print("open", fd, oct(stat.S_IFMT(status.st_mode)))
    try:
        print(os.pread(fd, 100, 0))
    except OSError:
        pass
"""


def test_no_descriptor_is_inherited():
    with Arena() as arena:
        (result,) = arena.play(attack("descriptors", SCAN, ends="ok"))
        assert arena.host.token not in result.stdout
        # neither a file nor a folder
        assert "0o100000" not in result.stdout and "0o40000" not in result.stdout
        assert result.stdout.count("0o140000") == 1  # the private channel and no other socket
        plain = subprocess.run(
            [sys.executable, "-c", SCAN], capture_output=True, text=True, close_fds=False
        )
        assert arena.host.token in plain.stdout, "the attack does not bite"


def test_the_channel_cannot_be_read_or_written_by_number(arena):
    cell = """
    import fcntl, stat
    def is_socket(fd):
        try:
            return stat.S_ISSOCK(os.fstat(fd).st_mode)
        except OSError:
            return False
    (fd,) = [n for n in range(3, 1024) if is_socket(n)]
    iov = (ctypes.c_ulong * 2)(ctypes.addressof(ctypes.create_string_buffer(8)), 8)
    steps = {
        "write": lambda: os.write(fd, b"x"), "read": lambda: os.read(fd, 1), "dup": lambda: os.dup(fd),
        "dup2 of it": lambda: os.dup2(fd, 200), "dup2 over it": lambda: os.dup2(1, fd), "close": lambda: os.close(fd),
        "dup2 over it, inherited": lambda: os.dup2(1, fd, False), "writev": lambda: os.writev(fd, [b"x"]),
        "sendfile": lambda: os.sendfile(fd, 0, 0, 1), "fcntl dup": lambda: fcntl.fcntl(fd, fcntl.F_DUPFD, 100),
        "not blocking": lambda: os.set_blocking(fd, False), "owner": lambda: fcntl.fcntl(fd, fcntl.F_SETOWN, 1),
        "shutdown": lambda: sc(48, fd, 2), "connect": lambda: sc(42, fd, iov, 16), "bind": lambda: sc(49, fd, iov, 16),
        "listen": lambda: sc(50, fd, 1), "sendmsg": lambda: sc(46, fd, iov, 0), "sendmmsg": lambda: sc(307, fd, iov, 1, 0),
        "send to an address": lambda: sc(44, fd, iov, 1, 0, iov, 16), "close range": lambda: sc(436, fd, fd, 0),
        "asynchronous": lambda: fcntl.ioctl(fd, 0x5452, struct.pack("i", 1)), "option": lambda: sc(54, fd, 1, 2, iov, 4),
        "splice": lambda: sc(275, fd, 0, 1, 0, 1, 0), "peer's credentials": lambda: sc(55, fd, 1, 17, iov, iov),
    }
    for name, step in steps.items():
        try:
            print("BREACH", name, step())
        except OSError:
            print("refused", name)
    """
    (result,) = arena.play(attack("by number", cell, ends="ok"))
    assert result.stdout.count("refused") == 24


def test_other_runs_are_out_of_reach():
    with Arena() as mine, Arena(context="the other run's context") as other:
        there = other.environment._resources.folder.root
        other.run("open('note.txt', 'w').write('a secret of the other run')")
        (context,) = [p for p in there.glob("inbox/*/*") if p.is_file()]
        for path in (there, there / "scratch", there / "inbox", there.parent):
            mine.play(probe("list", f"return os.listdir({str(path)!r})"))
        for path in (context, there / "scratch" / "note.txt", there / "canary", there / "said"):
            assert path.exists()
            mine.play(probe("read", f"return open({str(path)!r}).read()"))
            mine.play(probe("write", f"return open({str(path)!r}, 'r+')"))
        mine.play(probe("plant", f"return open({str(there / 'scratch' / 'json.py')!r}, 'w')"))
        other.alive()


def test_the_context_cannot_be_changed():
    with Arena() as arena:
        inbox = arena.environment._resources.folder.inbox
        (file,) = [p for p in inbox.glob("*/*") if p.is_file()]
        for body in (
            f"return open({str(file)!r}, 'r+')",
            f"os.unlink({str(file)!r})\nreturn 'gone'",
            f"os.rename({str(file)!r}, 'x')\nreturn 'moved'",
            f"os.truncate({str(file)!r}, 0)\nreturn 'cut'",
            f"os.rmdir({str(file.parent)!r})\nreturn 'gone'",
        ):
            arena.play(probe("context", body))
        assert file.read_text() == "some text"
        assert arena.run("import os; os._exit(3)").status == "crashed"
        assert "some text" in arena.run("print(context)").stdout


def test_the_repository_is_out_of_reach_by_import(arena):
    cell = f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nimport rlm_runtime.cli\nprint('BREACH', rlm_runtime.__file__)"
    arena.play(attack("import", cell, "import pydantic\nprint('BREACH')", ends="error"))
