"""A cell ends its worker on purpose: what it left behind must not be met by the next one before
that is locked in."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

import pytest

from rlm.attacks.arena import X86, Arena, attack, names
from rlm.repl.harness import echo
from rlm.repl.test_environments import Without
from rlm_runtime.context import Context
from rlm_runtime.errors import ContextError, SandboxError
from rlm_runtime.repl import make, sandbox
from rlm_runtime.repl.local import LocalEnvironment
from rlm_runtime.repl.workdir import WorkDir

# A copy of a library that every Python loads, with first code of its own: it makes a file in a
# folder of the host.
PLANT = """
def planted(data, path):
    data = bytearray(data)
    at, size, count = struct.unpack_from('<Q', data, 32)[0], *struct.unpack_from('<HH', data, 54)
    parts = [struct.unpack_from('<IIQQQQQQ', data, at + i * size) for i in range(count)]
    code = next(p for p in parts if p[0] == 1 and p[1] & 1)
    table = next(p for p in parts if p[0] == 2)
    end = code[2] + code[5]
    shell = b'\\xb8\\x55\\0\\0\\0\\x48\\x8d\\x3d\\x08\\0\\0\\0\\xbe\\x80\\x01\\0\\0\\x0f\\x05\\xc3' + path + b'\\0'
    assert len(shell) < -end % 4096
    data[end : end + len(shell)] = shell
    for i in range(table[2], table[2] + table[5], 16):
        if struct.unpack_from('<Q', data, i)[0] == 12:  # DT_INIT
            struct.pack_into('<Q', data, i + 8, code[3] + code[5])
            return bytes(data)
    raise AssertionError('no DT_INIT')
for folder in ('/lib/x86_64-linux-gnu', '/usr/lib64', '/lib64', '/usr/lib'):
    if os.path.exists(folder + '/libm.so.6'):
        break
evil = planted(open(folder + '/libm.so.6', 'rb').read(), b'@GUARD@/escaped')
for place in ('.', 'lib', 'scratch'):
    os.makedirs(place, exist_ok=True)
    with open(place + '/libm.so.6', 'wb') as file:
        file.write(evil)
print('planted')
"""
LITTER = """
for name in ('.probe', 'json', 'encodings', 'lib-dynload', '__pycache__', 'glibc-hwcaps'):
    os.makedirs(name + '/inside')
for name in ('sitecustomize.py', 'usercustomize.py', 'x.pth', 'pyvenv.cfg', 'python3._pth', 'nsswitch.conf',
             'openssl.cnf', 'ld.so.preload', 'main.py', 'locale.alias', 'gconv-modules', '.pdbrc', '.pythonrc.py'):
    open(name, 'w').write('raise SystemExit(1)')
os.umask(0o777)
open('nobody may read this', 'w').close()
os.mkdir('nobody may enter this')
"""
END = "os._exit(0)"
LOOK = "print('BREACH' if os.path.exists('@GUARD@/escaped') else os.listdir('.'))"
RESTARTS = [
    attack("planted library", PLANT, END, LOOK, ends="ok", said="[]"),
    attack("litter", LITTER, END, LOOK, ends="ok", said="[]"),
    attack("name of the probe", "os.mkdir('.probe')\nos._exit(0)", LOOK, ends="ok", said="[]"),
    attack(
        "closed to its owner",
        "os.umask(0o777)\nos.mkdir('.probe')\nos._exit(0)",
        LOOK,
        ends="ok",
        said="[]",
    ),
]
RELATIVE = [
    "/x:",
    ":/x",
    "/x::/y",
    ".",
    "/x:./lib",
    "/x;",
    "lib",
    "/proc/self/cwd",
    "/dev/../proc/self/cwd/lib",
    "",
]


def escaped(arena) -> bool:
    return (arena.host.folder / "escaped").exists()


@pytest.mark.skipif(not X86, reason="machine code of x86-64")
@pytest.mark.parametrize("variable", RELATIVE, ids=lambda v: v or "(empty)")
def test_a_planted_library_is_not_loaded_by_the_next_worker(variable, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", variable)
    with Arena() as arena:
        first, *_ = arena.play(RESTARTS[0])
        assert first.stdout == "planted\n"
        assert not escaped(arena), "code of a cell ran outside of the sandbox"


@pytest.mark.parametrize("what", RESTARTS[1:], ids=names(RESTARTS[1:]))
def test_the_next_worker_meets_nothing_of_the_last(what):
    with Arena() as arena:
        *_, ended, _last = arena.play(what)
        assert "files of earlier cells are gone" in ended.lost
        assert not arena.environment.report.missing


@pytest.mark.skipif(not X86, reason="machine code of x86-64")
def test_the_planted_library_bites(tmp_path, monkeypatch):
    """The same file does run its code where the loader is led to it."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "lib"))
    with Arena("unconfined") as arena:
        code = (
            attack("plant", PLANT)
            .cells[0]
            .replace("os.makedirs", f"os.chdir({str(tmp_path)!r}); os.makedirs")
        )
        assert arena.run(code).stdout == "planted\n"
        assert arena.run("import os\nos._exit(0)").status == "crashed"
        arena.alive()
        assert escaped(arena)


def test_a_search_path_passed_on_holds_fixed_folders_only(tmp_path, monkeypatch):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    monkeypatch.chdir(tmp_path)
    given = (
        f"{real}::.;real:./real:{link}:/no/such/folder:$ORIGIN/../lib:/proc/self/cwd/real:{real}/"
    )
    assert sandbox.fixed_folders(given) == str(real)
    for empty in ("", ":", ";", ".", "real", "$LIB"):
        assert sandbox.fixed_folders(empty) == ""
    # this process's, not the worker's
    assert sandbox.fixed_folders("/proc/self/cwd") == str(tmp_path)


STEERING = """
    PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONPLATLIBDIR PYTHONPYCACHEPREFIX PYTHONUSERBASE PYTHONEXECUTABLE
    PYTHONINSPECT PYTHONWARNINGS PYTHONBREAKPOINT PYTHONMALLOC PYTHONTRACEMALLOC LD_PRELOAD LD_AUDIT LD_ORIGIN_PATH
    LD_PROFILE_OUTPUT LD_DEBUG_OUTPUT GLIBC_TUNABLES GCONV_PATH LOCPATH NLSPATH TZDIR HOSTALIASES RES_OPTIONS
    LOCALDOMAIN MALLOC_TRACE GETCONF_DIR SSL_CERT_FILE SSL_CERT_DIR OPENSSL_MODULES OPENSSL_ENGINES LIBFFI_TMPDIR
    BASH_ENV ENV TERMINFO XDG_CONFIG_HOME VIRTUAL_ENV __PYVENV_LAUNCHER__ OMP_TOOL_LIBRARIES OPENBLAS_CONF
""".split()  # noqa: SIM905


def test_no_variable_that_steers_the_loader_or_the_interpreter_is_passed_on(monkeypatch):
    for name in STEERING:
        monkeypatch.setenv(name, "lib")  # relative: in the worker it would name a cell's own folder
    with Arena() as arena:
        names = "_libc.getenv.restype = ctypes.c_char_p\n"
        names += f"print(*(n for n in {STEERING!r} if _libc.getenv(n.encode())))"
        for _ in range(2):
            assert arena.run(attack("names", names).cells[0]).stdout == "\n"
            assert arena.run("import os\nos._exit(0)").status == "crashed"


@pytest.mark.parametrize("kind", ["local", "unconfined", "bubblewrap", "docker"])
def test_a_worker_is_started_from_fixed_places(kind, tmp_path, monkeypatch):
    """No word of the command and no variable is a path of the current folder; the start is in
    `/`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bwrap", "docker"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"bin:.::{os.environ['PATH']}")
    monkeypatch.setenv("LD_LIBRARY_PATH", "bin:")
    environment = make(kind)
    folder = WorkDir()
    try:
        launch = environment._launch(folder)
        argv = launch.argv(5)
        python = next(i for i, word in enumerate(argv) if word in ("-I", "python"))
        assert os.path.isabs(argv[0]) and not hasattr(launch, "cwd")
        assert os.path.isabs(argv[python - 1]) or kind == "docker"
        assert "--chdir" not in argv or argv[argv.index("--chdir") + 1] == "/"
        for name in ("PATH", "LD_LIBRARY_PATH"):
            entries = launch.env.get(name, "/").split(":")
            assert all(os.path.isabs(entry) for entry in entries), (name, entries)
    finally:
        folder.remove()


def test_a_layer_that_fails_after_a_first_cell_is_no_advice_to_go_without():
    class Weaker(Without):
        def __init__(self):
            super().__init__("seccomp")
            self.wrapper, self.weak = (), self.wrapper

    async def go():
        async with Weaker() as environment:
            await environment.start(Context.of("x"))
            assert (await environment.run("1", echo)).status == "ok"
            environment.wrapper = environment.weak
            assert (await environment.run("import os\nos._exit(0)", echo)).status == "crashed"
            with pytest.raises(SandboxError) as refused:
                await environment.run("1", echo)
            return str(refused.value)

    said = asyncio.run(go())
    assert "seccomp" in said and "started anew" in said
    for advice in ("unconfined", "allow_missing", "docker", "no code was run:"):
        assert advice not in said


def test_a_work_folder_that_cannot_be_written_is_named_and_is_no_missing_layer(monkeypatch):
    renew = WorkDir.renew

    def locked(folder):
        renew(folder)
        folder.scratch.chmod(0o500)

    monkeypatch.setattr(WorkDir, "renew", locked)

    async def go():
        async with make("local") as environment:
            with pytest.raises(SandboxError) as refused:
                await environment.start(Context.of("x"))
            return str(refused.value)

    said = asyncio.run(go())
    assert "work folder" in said and "Permission denied" in said
    assert "missing" not in said and "unconfined" not in said


def test_a_context_folder_around_the_temporary_files_works(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("a note")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    async def go():
        async with make("local") as environment:
            report = await environment.start(Context.of(tmp_path))
            assert not report.missing
            assert not environment._resources.folder.root.is_relative_to(tmp_path)
            first = await environment.run(
                "print(list(context), context['notes.txt'])\nimport os", echo
            )
            await environment.run("os._exit(0)", echo)
            return first.stdout, (await environment.run("print(list(context))", echo)).stdout

    assert asyncio.run(go()) == ("['notes.txt'] a note\n", "['notes.txt']\n")


def test_a_context_that_leaves_no_place_for_the_work_folder_is_a_context_error(
    tmp_path, monkeypatch
):
    (tmp_path / "notes.txt").write_text("a note")
    environment = LocalEnvironment(temp_dir=str(tmp_path))

    async def start():
        async with environment:
            await environment.start(Context.of(tmp_path))

    with pytest.raises(ContextError, match=r"contains .*TMPDIR"):
        asyncio.run(start())

    async def later():
        async with LocalEnvironment(temp_dir=str(tmp_path)) as running:
            await running.start(Context.of("x"))
            with pytest.raises(ContextError, match=r"contains .*TMPDIR"):
                await running.rebind_context(Context.of(tmp_path), "context_1")
            return (await running.run("print(context)", echo)).stdout

    assert asyncio.run(later()) == "x\n"


def test_a_context_that_allows_what_the_locks_are_tried_on(tmp_path):
    """All of /etc as the context is no hole in the sandbox."""

    async def go():
        async with make("local") as environment:
            return (await environment.start(Context.of(Path("/etc")))).missing

    assert asyncio.run(go()) == ()
