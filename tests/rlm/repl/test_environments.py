"""The layers: what happens where one is missing, as an ordinary user, inside bubblewrap, in a
container, with packages."""

import asyncio
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rlm.repl.harness import HOLD, one, play, printed, run
from rlm_runtime.context import Context
from rlm_runtime.errors import SandboxError, UsageError
from rlm_runtime.repl import make
from rlm_runtime.repl.base import Limits
from rlm_runtime.repl.check import check
from rlm_runtime.repl.local import LocalEnvironment
from rlm_runtime.repl.sandbox import LAYERS, SandboxPolicy
from rlm_runtime.repl.worker import filter as seccomp
from rlm_runtime.repl.worker import syscalls

ROOT = Path(__file__).resolve().parents[3]

# Starts a command under a filter that answers some system calls like a kernel that does not have
# them.
WITHOUT = """
import os, sys
sys.path.insert(0, {root!r})
from rlm_runtime.repl.worker import filter, kernel, syscalls
names = sys.argv[1].split(",")
code = [(filter.LOAD, 0, 0, 0)]
for name in names:
    code += [(filter.JEQ, 0, 1, syscalls.number(name, kernel.MACHINE)), (filter.RETURN, 0, 0, filter.ERRNO | 38)]
kernel.prctl(38, 1)
filter.install([*code, (filter.RETURN, 0, 0, filter.ALLOW)])
os.execv(sys.argv[2], sys.argv[2:])
"""


class Without(LocalEnvironment):
    """The local environment on a kernel that lacks something."""

    def __init__(self, *calls, **options):
        super().__init__(**options)
        self.wrapper = (sys.executable, "-c", WITHOUT.format(root=str(ROOT)), ",".join(calls))


@pytest.mark.parametrize(
    ("layer", "call"),
    [
        ("landlock", "landlock_create_ruleset"),
        ("landlock", "landlock_restrict_self"),
        ("seccomp", "seccomp"),
    ],
)
def test_a_missing_layer_is_named_and_no_code_runs_without_a_word(layer, call):
    async def go():
        strict = Without(call)
        with pytest.raises(SandboxError) as refused:
            await strict.start(Context.of("x"))
        await strict.aclose()
        for part in (layer, "no code was run", f"allow_missing=('{layer}',)", "unconfined"):
            assert part in str(refused.value)
        other = next(name for name in ("landlock", "seccomp") if name != layer)
        still = Without(call, policy=SandboxPolicy(allow_missing=(other,)))
        with pytest.raises(SandboxError):
            await still.start(Context.of("x"))
        await still.aclose()
        loose = Without(call, policy=SandboxPolicy(allow_missing=(layer,)))
        async with loose:
            report = await loose.start(Context.of("x"))
            assert report.missing == (layer,) and report.layers[layer].startswith("missing")
            assert printed(await run(loose, "context")) == "'x'\n"

    asyncio.run(go())


def test_a_layer_nobody_knows_is_a_usage_error():
    with pytest.raises(UsageError, match="landlok"):
        SandboxPolicy(allow_missing=("landlok",))
    with pytest.raises(UsageError, match="unconfined"):
        make("nothing")


def test_an_unconfined_repl_says_so():
    async def go():
        async with make("unconfined") as environment:
            report = await environment.start(Context.of("x"))
            assert report.environment == "unconfined" and report.layers["seccomp"] == "off"
            assert "unconfined" in report.line()
            assert (
                printed(
                    await run(
                        environment, "import os; len(os.listdir('/')) > 0, len(os.environ) < 20"
                    )
                )
                == "(True, True)\n"
            )

    asyncio.run(go())


def test_a_worker_that_cannot_start_is_a_sandbox_error():
    async def go():
        for wrapper in (
            ("/no/such/program",),
            ("/bin/false",),
            ("/bin/sh", "-c", "echo broken >&2; exit 3", "sh"),
        ):
            environment = LocalEnvironment()
            environment.wrapper = wrapper
            with pytest.raises(SandboxError) as error:
                await environment.start(Context.of("x"))
            if "broken" in str(wrapper):
                assert "broken" in str(error.value) and "exit code 3" in str(error.value)
            await environment.aclose()
        slow = LocalEnvironment(Limits(start_seconds=0.2))
        slow.wrapper = ("/bin/sh", "-c", "sleep 60", "sh")
        with pytest.raises(SandboxError, match=r"0\.2 s"):
            await slow.start(Context.of("x"))
        await slow.aclose()

    asyncio.run(go())


def test_check_lists_the_layers():
    report = asyncio.run(check())
    assert set(report.layers) == set(LAYERS)
    out = subprocess.run(
        [sys.executable, "-m", "rlm_runtime.repl.check"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert "landlock" in out.stdout and "active" in out.stdout


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_of_each_machine_is_well_formed(machine):
    code = seccomp.program(machine, 1234, (5,), True, True)
    assert len(code) < 4096
    for i, (op, true, false, value) in enumerate(code):
        assert 0 <= true < 256 and 0 <= false < 256 and 0 <= value < 1 << 32
        if op in (seccomp.JEQ, seccomp.JGE, seccomp.JGT):
            assert i + 1 + max(true, false) < len(code)
    assert code[-1][0] == seccomp.RETURN


def evaluate(code, number, arch, arguments=()):
    """What the kernel would answer: the instructions of a filter, one by one."""
    words = {0: number, 4: arch}
    for i, value in enumerate([*arguments, *[0] * 6][:6]):
        words[16 + 8 * i], words[20 + 8 * i] = value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF
    at = accumulator = 0
    while True:
        op, true, false, value = code[at]
        at += 1
        if op == seccomp.LOAD:
            accumulator = words[value]
        elif op == seccomp.RETURN:
            return value
        else:
            hit = {
                seccomp.JEQ: accumulator == value,
                seccomp.JGE: accumulator >= value,
                seccomp.JGT: accumulator > value,
            }[op]
            at += true if hit else false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_lets_through_what_it_should_and_nothing_else(machine):
    arch = syscalls.MACHINES[machine][1]
    code = seccomp.program(machine, 1234, (5,), True, True)
    allow, deny, nosys = seccomp.ALLOW, seccomp.ERRNO | 1, seccomp.ERRNO | 38

    def answer(name, *arguments):
        return evaluate(code, syscalls.number(name, machine), arch, arguments)

    assert (
        answer("write", 1) == allow
        and answer("write", 5) == deny
        and answer("write", 5 + (1 << 32)) == deny
    )
    assert answer("openat") == answer("mmap") == answer("futex") == allow
    assert (
        answer("clone", 0x3D0F00) == allow
        and answer("clone", 17) == deny
        and answer("clone", 0x10000000 | 0x3D0F00) == deny
    )
    assert (
        answer("kill", 1234, 9) == allow
        and answer("kill", 1, 0) == deny
        and answer("kill", (1 << 32) - 1) == deny
    )
    assert answer("tgkill", 1234, 1234) == allow and answer("tgkill", 1) == deny
    assert (
        answer("sendto", 5, 0, 0, 0, 0) == allow and answer("sendto", 5, 0, 0, 0, 1 << 40) == deny
    )
    assert (
        answer("sendto", 6) == deny
        and answer("recvmsg", 5) == allow
        and answer("recvmsg", 7) == deny
    )
    assert answer("prlimit64", 0, 7, 0) == allow and answer("prlimit64", 0, 7, 1 << 33) == deny
    assert answer("prlimit64", 99, 7, 0) == deny
    assert (
        answer("socket")
        == answer("socketpair")
        == answer("execve")
        == answer("ptrace")
        == answer("tkill")
        == deny
    )
    assert answer("clone3") == answer("openat2") == nosys
    assert (
        answer("fcntl", 1, 8) == deny
        and answer("ioctl", 1, 0x5412) == deny
        and answer("prctl", 1) == deny
    )
    known = {
        syscalls.number(n, machine)
        for n in (
            *seccomp.FREE,
            "truncate",
            "fcntl",
            "ioctl",
            "prctl",
            "clone",
            "kill",
            "tgkill",
            "prlimit64",
            "rt_sigaction",
            "sendto",
            "recvfrom",
            "recvmsg",
            "dup2",
            "dup3",
        )
    }
    for number in range(1000):
        verdict = evaluate(code, number, arch, (5, 5, 1, 1, 1, 1))
        if number not in known:
            assert verdict != allow, number
        assert evaluate(code, number, arch ^ 1) == deny
        assert evaluate(code, number + 0x40000000, arch) != allow
    assert evaluate(code, 2000, arch) == nosys


# -- an ordinary user


def ordinary_python() -> list[str]:
    """A command that runs Python as an ordinary user. Skips where there is none to be had."""
    if os.getuid() != 0:
        return [sys.executable]
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed: cannot become an ordinary user")
    front = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        test = "import subprocess, sys; sys.exit(sys.version_info < (3, 11) or subprocess.run([sys.executable, '-V']).returncode)"
        if (
            subprocess.run(
                [*front, python, "-c", test], capture_output=True, check=False
            ).returncode
            == 0
        ):
            return [*front, python]
    pytest.skip("no Python 3.11 that an ordinary user may read (this one lies in a private folder)")


def test_the_sandbox_is_whole_for_an_ordinary_user_too(tmp_path):
    python = ordinary_python()
    work = tmp_path / "work"
    work.mkdir()
    work.chmod(0o777)
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & stat.S_IXOTH and folder.owner() == "root":
            work = Path("/tmp")
    program = f"""
    import asyncio, os, sys
    sys.path[:0] = {[str(ROOT), *[p for p in sys.path if "site-packages" in p]]!r}
    from rlm_runtime.repl import make
    from rlm_runtime.repl.base import Limits, Outcome
    from rlm_runtime.repl.sandbox import SandboxPolicy
    from rlm_runtime.context import Context
    async def echo(request): return [Outcome(value=p) for p in request.prompts]
    async def go():
        limits = Limits(cell_seconds=2, grace_seconds=0.5, scratch=16 << 20)
        async with make("local", limits, SandboxPolicy(files=100)) as environment:
            report = await environment.start(Context.of("x"))
            assert os.getuid() != 0 and not report.missing, report
            async def cell(code, status="ok"):
                result = await environment.run(code, echo)
                assert result.status == status, result
                return result
            assert (await cell("llm_query(context)")).stdout == "'x'\\n"
            for code in ("open('/etc/passwd')", "open('/proc/self/environ')", "open('/proc/%d/environ')" % os.getpid(),
                         "import os; os.fork()", "import socket; socket.socket()", "import os; os.kill(%d, 0)" % os.getpid(),
                         "import os; os.chmod('/tmp', 0)", "x = bytearray(4 << 30)",
                         "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))"):
                await cell(code, "error")
            big = "import os\\nkept = []\\nfor i in range(50):\\n    f = open('f', 'wb'); os.unlink('f')\\n"
            big += "    f.write(b'x' * 4_000_000); f.flush(); kept.append(f)\\nimport time; time.sleep(1.5)"
            assert "without a name" in (await cell(big, "killed")).error.message
            await cell("while True: pass", "timeout")
            await cell({HOLD!r}, "killed")
            assert (await cell("context")).stdout == "'x'\\n"
            assert (await cell("import os; os.mkdir('a', 0); os.mkdir('b'); os.mkdir('b/c', 0)")).stdout == ""
            folder = environment._resources.folder.root
        assert not folder.exists()
        print("whole")
    asyncio.run(go())
    """
    env = {"PATH": os.environ["PATH"], "TMPDIR": str(work), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*python, "-c", textwrap.dedent(program)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, cwd="/", timeout=60, check=False
    )
    if "No module named" in done.stderr or "pydantic_core" in done.stderr:
        pytest.skip(
            f"that Python cannot import what this one can: {done.stderr.strip().splitlines()[-1]}"
        )
    assert done.stdout == "whole\n", done.stderr


# -- bubblewrap


def test_without_bubblewrap_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        asyncio.run(check("bubblewrap"))


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_bubblewrap_wraps_the_same_worker(tmp_path):
    file = tmp_path / "context.txt"
    file.write_text("in a file\n" * 1_000_000)
    (tmp_path / "secret").write_text("x")
    try:
        report = asyncio.run(check("bubblewrap"))
    except SandboxError as error:
        pytest.skip(f"bubblewrap does not work here: {str(error)[:200]}")
    assert report.environment == "bubblewrap" and report.layers["namespaces"].startswith("active")
    results = play(
        "len(context), llm_query('x')",
        f"import os; os.path.exists({str(file.parent / 'secret')!r}), os.path.exists('/etc/passwd'), os.getpid() < 10",
        "x = 1\nwhile True: pass",
        "x",
        HOLD,
        "import os; os._exit(3)",
        "open('f', 'w').write('x'); context[:9]",
        kind="bubblewrap",
        context=file,
        limits={"cell_seconds": 1, "grace_seconds": 0.5},
    )
    assert printed(results[0]) == "(10000000, 'x')\n"
    assert printed(results[1]) == "(False, False, True)\n"
    assert [r.status for r in results[2:6]] == ["timeout", "ok", "killed", "crashed"]
    assert printed(results[6]) == "'in a file'\n"


# -- docker: no engine is needed to see what would be asked of one


def test_docker_is_asked_for_a_locked_container(tmp_path, monkeypatch):
    (tmp_path / "context.txt").write_text("x")
    fake = tmp_path / "bin" / "docker"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\nfor a in "$@"; do echo "$a"; done >> {tmp_path}/argv\necho \'no daemon here\' >&2; exit 125\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    async def go():
        environment = make("docker", Limits(memory=1 << 30, scratch=1 << 20), packages=("numpy",))
        with pytest.raises(SandboxError) as error:
            await environment.start(Context.of(tmp_path / "context.txt"))
        assert "no daemon here" in str(error.value) and "exit code 125" in str(error.value)
        assert "docker service" in str(error.value).lower()

    asyncio.run(go())
    argv = (tmp_path / "argv").read_text().split("\nkill\n")[0].split("\n")
    assert argv[0] == "run" and "secret" not in str(argv)
    for option, value in {
        "--network": "none",
        "--cap-drop": "ALL",
        "--security-opt": "no-new-privileges",
        "--pids-limit": "512",
        "--ipc": "none",
        "--log-driver": "none",
        "--workdir": "/rlm/scratch",
        "--entrypoint": "python",
        "--user": f"{os.getuid()}:{os.getgid()}",
    }.items():
        assert argv[argv.index(option) + 1] == value
    assert "--read-only" in argv and "--rm" in argv and "--interactive" in argv
    memory = argv[argv.index("--memory") + 1]
    assert int(memory) >= 1 << 30 and argv[argv.index("--memory-swap") + 1] == memory
    assert (
        "size=1048576" in argv[argv.index("--tmpfs") + 1]
        and "noexec" in argv[argv.index("--tmpfs") + 1]
    )
    mounts = [argv[i + 1] for i, a in enumerate(argv) if a == "--mount"]
    writable = [m for m in mounts if not m.endswith(",readonly")]
    assert len(writable) == 1 and writable[0].endswith("target=/rlm/said")
    assert any(m.endswith(f"target=/rlm/given{tmp_path}/context.txt,readonly") for m in mounts)
    assert (
        argv[-7:-1] == ["python:3.12-slim", "-I", "-S", "-X", "utf8", "/rlm/worker/main.py"]
        or "stdio" in argv
    )


def test_without_docker_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError, match=r"docs\.docker\.com"):
        asyncio.run(check("docker"))
    with pytest.raises(UsageError):
        make("docker", packages=("not a name",))


FAKE_DOCKER = """#!{python}
# Stands in for the docker command: starts the worker of the container's command with the container's mounts (by bwrap),
# without an engine, an image or a network of its own.
import os, sys
argv = sys.argv[1:]
if argv[0] != "run":
    open({log!r}, "a").write(" ".join(argv) + "\\n")
    sys.exit(0)
options = ["--dev-bind", "/", "/", "--tmpfs", "/rlm", "--unshare-net", "--die-with-parent", "--clearenv", "--setenv",
           "HOSTNAME", argv[argv.index("--name") + 1]]
for i, word in enumerate(argv):
    if word == "--mount":
        fields = dict(f.partition("=")[::2] for f in argv[i + 1].split(","))
        options += ["--ro-bind" if "readonly" in fields else "--bind", fields["source"], fields["target"]]
    elif word == "--tmpfs":
        options += ["--tmpfs", argv[i + 1].split(":")[0]]
    elif word == "--env":
        options += ["--setenv", *argv[i + 1].split("=", 1)]
command = argv[argv.index("--entrypoint") + 3:]
os.execvp("bwrap", ["bwrap", *options, "--chdir", argv[argv.index("--workdir") + 1], {python!r}, *command])
"""


@pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="the stand-in for docker needs bubblewrap"
)
def test_the_container_is_spoken_to_over_its_standard_streams(tmp_path, monkeypatch):
    if subprocess.run(
        ["bwrap", "--dev-bind", "/", "/", "--unshare-net", "true"], capture_output=True, check=False
    ).returncode:
        pytest.skip("bubblewrap does not work here")
    fake = tmp_path / "bin" / "docker"
    fake.parent.mkdir()
    fake.write_text(
        FAKE_DOCKER.format(python=os.path.realpath(sys.executable), log=str(tmp_path / "killed"))
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    (tmp_path / "context.txt").write_text("in a file\n" * 1_000_000)

    async def go():
        async with make("docker", Limits(cell_seconds=1, grace_seconds=0.5)) as environment:
            report = await environment.start(Context.of(tmp_path / "context.txt"))
            assert report.environment == "docker" and report.layers["container"].startswith(
                "active"
            ), report
            assert (
                printed(
                    await run(
                        environment, "len(context), llm_query('x' * 100_000) == 'x' * 100_000"
                    )
                )
                == "(10000000, True)\n"
            )
            raw = await run(
                environment, "import os\nos.write(1, b'raw')\nprint('secret' in str(os.environ))"
            )
            assert raw.stdout == "False\n" and raw.stderr == "raw"
            assert (await run(environment, "y = 1\nwhile True: pass")).status == "timeout"
            assert printed(await run(environment, "y")) == "1\n"
            killed = await run(environment, HOLD)
            assert killed.status == "killed" and killed.lost
            assert (
                await run(environment, "print('before'); import os; os._exit(4)")
            ).stdout == "before\n"
            await environment.rebind_context(Context.of(["a"]), "context_1")
            assert printed(await run(environment, "context_1, context[:2]")) == "(['a'], 'in')\n"

    asyncio.run(go())
    assert (tmp_path / "killed").read_text().count("kill rlm-") >= 3


# -- packages


def test_only_allowed_packages_can_be_imported():
    result, refused, parts, found = play(
        "import numpy as np\nnp.arange(6).reshape(2, 3).sum()",
        "import pydantic",
        "FINAL({'a': np.float64(1.5), 'b': np.arange(3), 'c': np.bool_(True)})",
        "import importlib.util\nimportlib.util.find_spec('pydantic'), importlib.util.find_spec('numpy') is not None",
        packages=("numpy",),
    )
    assert printed(result).strip() in ("15", "np.int64(15)")
    assert refused.error.type == "ModuleNotFoundError" and "numpy" in refused.error.message
    assert parts.answer.content == {"a": 1.5, "b": [0, 1, 2], "c": True}
    assert printed(found) == "(None, True)\n"


def test_the_files_of_other_packages_cannot_be_read():
    import pydantic

    code = f"open({pydantic.__file__!r}).read()"
    assert play("import numpy", code, packages=("numpy",))[1].error.type == "PermissionError"


def test_what_a_package_needs_comes_with_it():
    assert (
        printed(one("import pydantic; pydantic.BaseModel.__name__", packages=("pydantic",)))
        == "'BaseModel'\n"
    )


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(UsageError, match="no-such-package"):
        make("local", packages=("no-such-package",))


def test_without_packages_an_import_says_what_there_is():
    result = one("try:\n    import numpy\nexcept ImportError as e:\n    print(e)")
    assert "standard library" in printed(result)
