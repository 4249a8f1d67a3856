"""No socket of any family, by no way of asking for one."""

from __future__ import annotations

import pytest

from rlm.attacks.arena import X86, attack, names, probe

pytestmark = pytest.mark.skipif(not X86, reason="system call numbers of x86-64")

FAMILIES = """
made = []
for family in {families}:
    for kind in (1, 2, 3, 5):
        for protocol in (0, 1, 3, 6, 17, 255):
            try:
                sc(41, family, kind, protocol)
                made.append((family, kind, protocol))
            except OSError as problem:
                if problem.errno != 1:
                    made.append((family, kind, protocol, problem.errno))
if not made:
    raise PermissionError("none")
return made
"""
INT80 = """
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write({code!r})
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
result = ctypes.CFUNCTYPE(ctypes.c_int)(address)()
if result < 0:
    raise OSError(-result, "int 0x80")
return result
"""
GETPID32 = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"  # mov eax, 20; int 0x80; ret
SOCKET32 = (
    b"\x53\xb8\x67\x01\x00\x00\xbb\x02\x00\x00\x00\xb9\x01\x00\x00\x00\x31\xd2\xcd\x80\x5b\xc3"
)
SOCKETCALL32 = b"\x53\xb8\x66\x00\x00\x00\xbb\x01\x00\x00\x00\x31\xc9\xcd\x80\x5b\xc3"
EXECVE32 = b"\x53\xb8\x0b\x00\x00\x00\x31\xdb\x31\xc9\x31\xd2\xcd\x80\x5b\xc3"
SOCKET64 = b"\xb8\x29\x00\x00\x00\xbf\x02\x00\x00\x00\xbe\x01\x00\x00\x00\x31\xd2\x0f\x05\xc3"

PROBES = [
    probe("families 0 to 15", FAMILIES.format(families=range(16))),
    probe("families 16 to 50", FAMILIES.format(families=range(16, 50)), False),
    probe("a socket pair", "import socket\nreturn socket.socketpair()"),
    probe("a pair by number", "b = (ctypes.c_int * 2)()\nreturn sc(53, 1, 2, 0, b)"),
    probe(
        "tcp to the host",
        "import socket\nreturn socket.create_connection(('127.0.0.1', @PORT@), 2)",
        False,
    ),
    probe(
        "udp to the host",
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nreturn s.sendto(b'x', ('127.0.0.1', @UDP@))",
        False,
    ),
    probe(
        "unix path",
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('@GUARD@/socket')\nreturn s",
        False,
    ),
    probe(
        "abstract",
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0rlm-attacks-@TOKEN@')\nreturn s",
        False,
    ),
    probe("a server", "import socket\nreturn socket.create_server(('127.0.0.1', 0))"),
    probe("netlink", "import socket\nreturn socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)"),
    probe(
        "a web page",
        "import urllib.request\nreturn urllib.request.urlopen('http://127.0.0.1:@PORT@/', timeout=2).read()",
        False,
    ),
    probe(
        "asyncio",
        "import asyncio\nasync def go():\n    return await asyncio.wait_for(asyncio.open_connection('127.0.0.1', @PORT@), 2)\nreturn asyncio.run(go())",
        False,
    ),
    probe(
        "a socket from the channel's number",
        "import socket, stat\nfor fd in range(3, 1024):\n    try:\n        if stat.S_ISSOCK(os.fstat(fd).st_mode):\n            break\n    except OSError:\n        pass\ns = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=fd)\ns.connect(('127.0.0.1', @PORT@))\nreturn 'connected'",
        False,
    ),
    probe("io_uring", "b = ctypes.create_string_buffer(120)\nreturn sc(425, 4, b)", False),
    probe("io_uring enter", "return sc(426, 3, 1, 0, 0, 0, 0)", False),
    probe("io_uring register", "return sc(427, -1, 0, 0, 0)", False),
    probe("asynchronous io", "b = ctypes.create_string_buffer(8)\nreturn sc(206, 4, b)"),
    probe("x32 socket", "return sc(0x40000000 + 41, 2, 1, 0)", False),
    probe("x32 getpid", "return sc(0x40000000 + 39)", False),
    probe(
        "x32 own numbers",
        "made = []\nfor n in range(512, 548):\n    try:\n        made.append(sc(0x40000000 + n))\n    except OSError as p:\n        if p.errno != 1:\n            made.append((n, p.errno))\nif not made:\n    raise PermissionError()\nreturn made",
        False,
    ),
    probe("high word of the number", "return sc((1 << 32) + 41, 2, 1, 0)", False),
    probe("high word of the family", "return sc(41, (1 << 32) + 2, 1, 0)"),
    probe("negative number", "return sc(-1)", False),
    probe("machine code", INT80.format(code=SOCKET64)),
    probe("accept", "return sc(43, 0, 0, 0)", False),
    probe("name of the machine", "import socket\nreturn socket.gethostbyname('localhost')", False),
    probe("device of the network", "return os.open('/dev/net/tun', os.O_RDWR)", False),
    probe("tables of the network", "import socket\nreturn socket.if_nameindex()"),
]


@pytest.mark.parametrize("what", PROBES, ids=names(PROBES))
def test_refused(arena, what):
    arena.play(what)


BITING = [p for p in PROBES if p.bites]


@pytest.mark.parametrize("what", BITING, ids=names(BITING))
def test_bites_without_a_sandbox(open_arena, what):
    result = open_arena.run(what.cells[0])
    assert "BREACH" in result.stdout, result


def test_a_connection_without_a_sandbox_reaches_the_host(open_arena):
    """What the other probes try would work."""
    open_arena.run("import socket\nprint(socket.create_connection(('127.0.0.1', @PORT@), 5))")
    with pytest.raises(AssertionError, match="connected"):
        open_arena.host.unharmed()


@pytest.mark.parametrize(
    "code",
    [GETPID32, SOCKET32, SOCKETCALL32, EXECVE32],
    ids=["pid", "socket", "socketcall", "exec"],
)
def test_calls_of_32_bits_are_refused(arena, code):
    """Or the kernel has none, and the cell ends its worker."""
    what = probe("int80", INT80.format(code=code))
    result = arena.run(what.cells[0])
    assert "BREACH" not in result.stdout, result
    if result.status == "ok":
        assert "Errno 1]" in result.stdout, result
    else:
        assert result.status == "crashed", result
    arena.alive()
    arena.host.unharmed()


def test_a_descriptor_cannot_be_smuggled_over_the_channel(arena):
    cell = """
    import stat
    for fd in range(3, 1024):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                break
        except OSError:
            pass
    data = ctypes.create_string_buffer(b"{}")
    iov = (ctypes.c_ulong * 2)(ctypes.addressof(data), 2)
    control = ctypes.create_string_buffer(struct.pack("Niii", 20, 1, 1, 0) + bytes(4))
    message = (ctypes.c_ulong * 7)(0, 0, ctypes.addressof(iov), 1, ctypes.addressof(control), 24, 0)
    for number in (46, 307):
        try:
            print("BREACH", sc(number, fd, message, 0 if number == 46 else 1, 0))
        except OSError as problem:
            print(problem.errno)
    """
    arena.play(attack("rights", cell, ends="ok", said="1\n1\n"))
