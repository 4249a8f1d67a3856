"""Hostile cells: whatever they try, it fails inside, the REPL answers the next cell, and the host
is as it was."""

import os
import signal
import socket

import pytest

from rlm.repl.harness import QUICK, children, one, play, printed

SECRET = "hunter2-the-secret-of-the-host"


def refused(code: str, **options) -> str:
    """The error a cell ran into; the REPL works afterwards."""
    result, after = play(code, "'alive'", **options)
    assert after.stdout == "'alive'\n"
    assert result.status == "error", result
    return f"{result.error.type}: {result.error.message}"


# -- secrets


def test_no_variable_of_the_host_is_in_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("PYTHONPATH", "/tmp")
    code = """
    import os, ctypes
    environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')
    names = []
    while environ[len(names)]: names.append(environ[len(names)])
    print(sorted(os.environ), names)
    """
    text = printed(one(code))
    assert (
        SECRET not in text
        and "OPENAI" not in text
        and "PYTHONPATH" not in text
        and "'HOME'" in text
    )


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/etc/shadow",
        "/etc/hostname",
        "/proc/self/environ",
        "/proc/self/maps",
        "/proc/self/mem",
        "/proc/1/environ",
        "/proc/{host}/environ",
        "/proc/{host}/mem",
        "/proc/{host}/cmdline",
        "/proc/{host}/maps",
        "/proc/{host}/fd/0",
        "/proc/{host}/root/etc/passwd",
        "/proc/{host}/cwd/setup.py",
        "/proc/cpuinfo",
        "{home}/.bashrc",
        "{repo}/pyproject.toml",
        "{repo}/rlm_runtime/repl/host.py",
        "../canary",
        "../said",
        "/dev/mem",
        "/dev/kmsg",
        "/dev/shm/x",
        "/sys/kernel/notes",
        "/dev/tty",
        "/dev/ptmx",
        "/dev/fuse",
        "{site}",
    ],
)
def test_no_file_of_the_host_can_be_opened(path):
    repo = os.path.abspath(os.path.join(os.path.dirname(__file__), "../../.."))
    path = path.format(
        host=os.getpid(), home=os.path.expanduser("~"), repo=repo, site=pytest.__file__
    )
    assert "Error" in refused(f"open({path!r}, 'rb').read(10)")
    assert "Error" in refused(f"open({path!r}, 'ab')")


def test_packages_installed_inside_the_standard_library_cannot_be_read():
    code = """
    import os
    site = os.path.join(os.path.dirname(os.__file__), 'site-packages')
    print([name for name in os.listdir(site) if name.endswith('.py') or name == 'pip']) if os.path.isdir(site) else None
    open(os.path.join(site, 'pip', '__init__.py'))
    """
    assert refused(code).split(":")[0] in ("PermissionError", "FileNotFoundError")


def test_folders_of_the_host_can_not_be_listed():
    for path in (
        "/",
        "/proc",
        "/etc",
        "..",
        os.path.expanduser("~"),
        "/tmp",
        "/proc/self/fd",
        f"/proc/{os.getpid()}/fd",
    ):
        assert "PermissionError" in refused(f"import os; os.listdir({path!r})")


def test_the_context_can_be_read_and_not_written(tmp_path):
    file = tmp_path / "context.txt"
    file.write_text("the context\n" * 1_000_000)
    (tmp_path / "secret.txt").write_text(SECRET)
    code = f"""
    import os
    tries = []
    for name in ({str(file)!r}, {str(tmp_path / "secret.txt")!r}):
        for mode in ('r', 'r+', 'a', 'w'):
            try: open(name, mode); tries.append(mode)
            except OSError: pass
    for call in (os.unlink, os.truncate, lambda p: os.truncate(p, 0), lambda p: os.rename(p, 'x'), lambda p: os.chmod(p, 0),
                 lambda p: os.utime(p), lambda p: os.link(p, 'l'), lambda p: os.chown(p, 0, 0)):
        try: call({str(file)!r}); tries.append(call)
        except (OSError, TypeError): pass
    for fd in range(64):
        for call in (lambda: os.ftruncate(fd, 0), lambda: os.fchmod(fd, 0), lambda: os.pwrite(fd, b'x', 0)):
            try:
                if os.fstat(fd).st_size == {file.stat().st_size}: call(); tries.append(fd)
            except OSError: pass
    print(tries, context[:11])
    """
    assert printed(one(code, context=file)) == "['r'] the context\n"
    assert file.stat().st_size == 12_000_000 and file.stat().st_mode & 0o777 == 0o644


def test_a_link_does_not_lead_out(tmp_path):
    (tmp_path / "f.txt").write_text("inside")
    assert "PermissionError" in refused("import os; os.symlink('/etc/passwd', 'l')")
    assert "PermissionError" in refused("import os; os.link('/etc/passwd', 'l')")
    assert "PermissionError" in refused("import os; os.mkfifo('f')")
    assert "Error" in refused("open('context/../../../../etc/passwd')", context=tmp_path)
    (tmp_path / "out").symlink_to("/etc/passwd")
    assert "Error" in refused(f"open({str(tmp_path / 'out')!r}).read()", context=tmp_path)


def test_nothing_of_the_host_came_along_as_a_descriptor(tmp_path):
    (tmp_path / "open").write_text(SECRET)
    with open(tmp_path / "open") as held:
        os.set_inheritable(held.fileno(), True)
        code = """
        import os, stat
        kinds = []
        for fd in range(4096):
            try: kinds.append(stat.S_IFMT(os.fstat(fd).st_mode))
            except OSError: pass
        print(len(kinds), kinds[0] == stat.S_IFCHR, kinds[1:3] == [stat.S_IFIFO] * 2, kinds[3] == stat.S_IFSOCK)
        """
        assert printed(one(code)) == "4 True True True\n"


def test_the_memory_of_the_host_can_not_be_read():
    code = f"""
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(16)
    class iovec(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('len', ctypes.c_size_t)]
    local, remote = iovec(ctypes.addressof(buffer), 16), iovec(0x400000, 16)
    print(libc.process_vm_readv({os.getpid()}, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0), ctypes.get_errno())
    print(libc.ptrace(16, {os.getpid()}, 0, 0), ctypes.get_errno())
    """
    assert printed(one(code)) == "-1 1\n-1 1\n"


# -- network


def test_no_socket_of_any_family_can_be_made():
    code = """
    import _socket, ctypes
    made = []
    for family in range(-1, 64):
        for kind in range(0, 12):
            try: made.append(_socket.socket(family, kind))
            except OSError as e: made += [] if e.errno == 1 else [(family, kind, e)]
    try: made.append(_socket.socketpair())
    except OSError: pass
    libc = ctypes.CDLL(None, use_errno=True)
    made += [r for r in (libc.socket(2, 1, 0), libc.socket(1, 1, 0), libc.socket(16, 3, 0)) if r != -1]
    made
    """
    assert printed(one(code)) == "[]\n"


def test_a_listening_host_is_not_reached(tmp_path):
    server, local = socket.socket(), socket.socket(socket.AF_UNIX)
    try:
        server.bind(("127.0.0.1", 0))
        server.listen()
        local.bind(str(tmp_path / "s"))
        local.listen()
        port = server.getsockname()[1]
        assert "PermissionError" in refused(
            f"import socket; socket.create_connection(('127.0.0.1', {port}))"
        )
        assert "Error" in refused(
            f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}')"
        )
        code = (
            f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(tmp_path / 's')!r})"
        )
        assert "PermissionError" in refused(code)
        assert "error" in refused("import socket; socket.getaddrinfo('example.com', 80)[0]")
        for listener in (server, local):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
    finally:
        server.close()
        local.close()


def test_the_channel_cannot_be_turned_into_another_connection():
    code = """
    import _socket, os, stat
    def is_channel(fd):
        try: return stat.S_ISSOCK(os.fstat(fd).st_mode)
        except OSError: return False
    (fd,) = filter(is_channel, range(4096))
    tries = []
    for call in (lambda: os.write(fd, b'x'), lambda: os.read(fd, 1), lambda: os.dup(fd), lambda: os.dup2(fd, 9),
                 lambda: os.dup2(1, fd), lambda: os.close(fd), lambda: os.writev(fd, [b'x']), lambda: os.readv(fd, [bytearray(1)]),
                 lambda: os.sendfile(fd, 0, 0, 10), lambda: _socket.socket(fileno=fd).shutdown(2)):
        try: tries.append(call())
        except OSError: pass
    os.closerange(3, 256)
    tries
    """
    result, after = play(code, "llm_query('still')")
    assert printed(result) == "[]\n" and printed(after) == "'still'\n"


# -- processes and signals


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.fork()",
        "import os; os.forkpty()",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.execv('/bin/true', ['true'])",
        "import subprocess; subprocess.run(['true'])",
        "import subprocess; subprocess.run('true', shell=True, check=True)",
        "import os; assert os.system('true') == 0",
        "import os; os.popen('true').read()",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "import multiprocessing; multiprocessing.Pool(1)",
        "from concurrent.futures import ProcessPoolExecutor as P; P(1).submit(print).result()",
        "import asyncio; asyncio.run(asyncio.create_subprocess_exec('true'))",
        "import pty; pty.spawn('true')",
        "import os; os.memfd_create('x')",
        "import os; os.pidfd_open(os.getpid())",
        "import os; os.setuid(0) if os.getuid() else os.setuid(1)",
        "import os; os.chroot('.')",
        "import os; os.setsid()",
        "import os; os.sched_setaffinity(0, {0})",
        "import os; os.nice(-5)",
        "import os; os.setpriority(0, 0, -5)",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))",
        "import resource; resource.prlimit(0, resource.RLIMIT_FSIZE, (-1, -1))",
        "import resource, os; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        "import os; os.mknod('x')",
        "import os; os.setxattr('.', 'user.x', b'')",
        "import fcntl; fcntl.ioctl(0, 0x5412, b'x')",
        "import fcntl, os; fcntl.fcntl(1, 8, os.getppid())",
        "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)",
    ],
)
def test_calls_that_leave_the_process_are_refused(code):
    refused(code)


def test_no_other_process_can_be_signalled():
    got = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
    try:
        code = """
        import os, signal, ctypes
        sent = []
        for pid in (os.getppid(), {host}, 1, 0, -1, -{host}):
            for number in (0, signal.SIGUSR1, signal.SIGTERM):
                try: os.kill(pid, number); sent.append((pid, number))
                except OSError: pass
        try: os.killpg(0, signal.SIGUSR1); sent.append('group')
        except OSError: pass
        libc = ctypes.CDLL(None)
        for name in ('tgkill', 'sigqueue'): sent += [name] if getattr(libc, name)({host}, {host}, 10) == 0 else []
        sent += ['tkill'] if libc.syscall(200, {host}, 10) == 0 else []
        sent
        """.format(host=os.getpid())
        assert printed(one(code)) == "[]\n" and not got
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_system_calls_by_number_are_refused_whatever_the_spelling():
    code = """
    import ctypes, platform
    libc = ctypes.CDLL(None, use_errno=True)
    x86 = platform.machine() == 'x86_64'
    names = dict(fork=57, vfork=58, clone=56, clone3=435, execve=59, ptrace=101, mount=165, unshare=272, setns=308, bpf=321,
                 keyctl=250, io_uring_setup=425, userfaultfd=323, perf_event_open=298, socket=41, connect=42, bind=49,
                 memfd_create=319, pidfd_open=434, process_vm_writev=311, kexec=246, init_module=175, personality=135,
                 shmget=29, msgget=68, semget=64, mq_open=240, inotify_init=253, fanotify=300, acct=163, swapon=167,
                 reboot=169, seccomp=317, landlock=444, prctl_dumpable=157, setuid=105, open_by_handle=304, quotactl=179,
                 memfd_secret=447, mseal=462, open_tree=428, process_madvise=440, kcmp=312, name_to_handle_at=303,
                 modify_ldt=154, iopl=172, ioperm=173, add_key=248, request_key=249, timer_create=222, vmsplice=278)
    through = {}
    for name, number in names.items() if x86 else ():
        for offset in (0, 0x40000000):
            ctypes.set_errno(0)
            arguments = (11, 0, 0, 0, 0) if name == 'clone' else (4, 1, 0, 0, 0) if name == 'prctl_dumpable' else (0,) * 5
            result = libc.syscall(ctypes.c_long(number + offset), *map(ctypes.c_long, arguments))
            if result != -1 or ctypes.get_errno() not in (1, 38): through[name, offset] = (result, ctypes.get_errno())
    through
    """
    assert printed(one(code)) == "{}\n"


def test_a_32_bit_call_is_not_another_call():
    machine_code = b"\xb8\x02\x00\x00\x00\xcd\x80\xc3"  # mov eax, 2 (fork on i386); int 0x80; ret
    code = f"""
    import ctypes, mmap, platform
    if platform.machine() == 'x86_64':
        m = mmap.mmap(-1, 4096, prot=7)
        m.write({machine_code!r})
        print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))() < 0)
    """
    before = children()
    result, after = play(code, "1")
    assert after.stdout == "1\n" and result.stdout in ("True\n", "") and children() == before


# -- bombs


def test_memory_bombs_are_a_memory_error():
    limits = {"memory": 256 << 20}
    first, second, third, after = play(
        "keep = 1\nx = bytearray(1 << 30)",
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        "x = 'a'\nwhile True: x += x",
        "keep",
        limits=limits,
    )
    for result in (first, second, third):
        assert result.error.type == "MemoryError" and "256 MiB" in result.error.message
    assert printed(after) == "1\n"


@pytest.mark.parametrize(
    "code",
    [
        "import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(100)]",
        "import ctypes\nx = ctypes.create_string_buffer(1 << 30)",
        "x = {}\nfor i in range(10**9): x[i] = str(i) * 10",
        "x = 10 ** 10 ** 10",
        "x = [0] * 10**12",
        "x = '%1000000000d' % 1",
        "x = []\nfor i in range(10**9): x = [x, x[:]]",
        "import re\nre.compile('(' * 10**6)",
    ],
)
def test_other_memory_bombs_are_contained(code):
    result, after = play(code, "'alive'", limits=QUICK | {"memory": 256 << 20})
    assert result.status != "ok" and after.stdout == "'alive'\n"


def test_a_fork_bomb_makes_no_process():
    before = children()
    refused("import os\nwhile True: os.fork()")
    assert children() == before


def test_a_thread_bomb_ends_by_itself_or_is_ended():
    code = "import threading, time\nthreading.stack_size(1 << 15)\n"
    code += "while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    result, after = play(code, "'alive'", limits={"cell_seconds": 20})
    assert result.status in ("killed", "error") and after.stdout == "'alive'\n"
    assert (
        "threads" in result.error.message
        or "thread" in result.error.message
        or result.error.type == "MemoryError"
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("f = open('big', 'wb')\nwhile True: f.write(b'x' * 1_000_000)", "too large"),
        (
            "for i in range(100):\n    open(f'{i}', 'wb').write(b'x' * 4_000_000)",
            "MiB in the work folder",
        ),
        ("for i in range(10**6): open(f'{i}', 'w')", "files in the work folder"),
        ("import os\nfor i in range(10**6): os.mkdir(f'{i}')", "files in the work folder"),
        ("import os\nfor i in range(10**6): os.mkdir('d'); os.chdir('d')", "in the work folder"),
        (
            "import os\nkept = []\nfor i in range(200):\n"
            "    f = open('f', 'wb'); os.unlink('f'); f.write(b'x' * 4_000_000); f.flush(); kept.append(f)",
            "files without a name",
        ),
        (
            "import tempfile\nk = [tempfile.TemporaryFile() for _ in range(1000)]",
            "Too many open files",
        ),
    ],
)
def test_disk_bombs_are_stopped_and_cleaned_away(code, said, tmp_path):
    from rlm_runtime.repl.sandbox import SandboxPolicy

    code += "\nimport time; time.sleep(30)"
    result, after = play(
        code,
        "import os; os.listdir('.')",
        limits={"scratch": 16 << 20, "cell_seconds": 20},
        policy=SandboxPolicy(files=500),
    )
    assert said in result.error.message and result.wall_seconds < 15
    if result.status == "killed":
        assert result.lost and printed(after) == "[]\n"


def test_a_folder_nobody_may_enter_is_removed(tmp_path):
    code = "import os\nos.mkdir('a'); os.mkdir('a/b', 0); os.umask(0o777); os.mkdir('c'); open('f', 'w')\nos.listdir('.')"
    result = one(code)
    assert "'a'" in printed(result)  # and the fixture sees that nothing is left of it


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import time\nwhile True: time.sleep(0.01)",
        "import time; time.sleep(10**6)",
        "import threading; threading.Event().wait()",
        "import threading; l = threading.Lock(); l.acquire(); l.acquire()",
        "def f():\n    try: f()\n    finally: f()\nf()",
        "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
        "sum(range(10**12))",
        "10 ** 10 ** 8 % 7",
        "max(iter(int, 1))",
        "class A:\n    def __repr__(self):\n        while True: pass\nA()",
        "class A(dict):\n    def __iter__(self):\n        while True: yield 1\n    keys = items = __iter__\n"
        "answer['content'] = A()\nanswer['ready'] = True\nclass B(dict):\n    def items(self):\n        while True: pass\n"
        "answer['content'] = B()",
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))\nwhile True: pass",
        "import sys\nsys.settrace(lambda *a: None)\nwhile True: pass",
        "import sys\ndef t(*a):\n    while True: pass\nsys.setprofile(t)",
        "import gc\ngc.callbacks.append(lambda *a: exec('while True: pass'))\ngc.collect()",
        "import ctypes, os\nctypes.CDLL(None).pause()",
        "import ctypes\nctypes.PyDLL(None).sleep(1000)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        "class D:\n    def __del__(s):\n        while True: pass\nD()",
        "import _thread\n_thread.start_new_thread(lambda: exec('while True: pass'), ())\nwhile True: pass",
        "import asyncio\nasyncio.run(asyncio.sleep(1000))",
        "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        "while True: print('x')",
        "import os\nwhile True: os.write(1, b'y' * 65536)",
        "llm_query.__globals__['jsonable'].plain = None\nwhile True: pass",
        "import itertools\nfor _ in itertools.count(): pass",
    ],
)
def test_what_never_ends_is_ended(code):
    result, after = play(code, "'alive'", limits=QUICK | {"memory": 512 << 20})
    assert result.status in ("timeout", "killed", "error"), result
    assert result.wall_seconds < 15
    assert after.stdout == "'alive'\n"
    assert (result.status == "killed") == bool(result.lost)


@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(0)",
        "import os; os._exit(3)",
        "import os; os.abort()",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "import ctypes; ctypes.string_at(0)",
        "import faulthandler; faulthandler._sigsegv()",
        "import threading, os\nthreading.Timer(0.1, os._exit, (7,)).start()\nimport time; time.sleep(30)",
        "import ctypes; ctypes.CDLL(None).exit(5)",
        "import signal; signal.raise_signal(signal.SIGTERM)",
        "import _posixsubprocess, ctypes; ctypes.memset(id(None), 0, 16); None",
    ],
)
def test_a_dead_worker_is_replaced_and_the_model_told(code):
    result, lost, context = play(
        "x = 1\nprint('first')", "print('before')\n" + code, "x if 'x' in globals() else context"
    )[0:3]
    assert result.stdout == "first\n"
    assert lost.status == "crashed" and "before" in lost.stdout and lost.error.type == "WorkerDied"
    assert "variables" in lost.lost and "`context`" in lost.lost
    assert context.stdout == "'some text'\n" and context.lost is None


def test_a_worker_that_dies_between_two_cells_is_noticed():
    code = """
    import threading, time, os
    def later():
        time.sleep(0.2)
        os._exit(9)
    threading.Thread(target=later, daemon=True).start()
    """
    import asyncio

    from rlm.repl.harness import run
    from rlm_runtime.context import Context
    from rlm_runtime.repl import make

    async def go():
        async with make("local") as environment:
            await environment.start(Context.of("x"))
            printed(await run(environment, code))
            (worker,) = children()
            os.kill(worker, signal.SIGKILL)
            while environment._process is not None and not environment._process.ended.done():
                await asyncio.sleep(0.01)
            after = await run(environment, "context")
            assert printed(after) == "'x'\n" and "between two cells" in after.lost
            assert (await run(environment, "1")).lost is None

    asyncio.run(go())
