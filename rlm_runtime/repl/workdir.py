"""The private folders of a worker: made, measured while a cell runs, removed whatever a cell built
in them.

Names carry the host's process id and its start time, so that what a killed host left behind is
recognised and swept away by the next one. Nothing here follows a link, recurses, or trusts a path
to be short.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "rlm-repl"
MIRROR = 64 << 10  # bytes of stdout, and of stderr, that outlive a worker
DEPTH = 64  # folders inside folders; more is a violation, as paths end at 4096 bytes
_swept: set[str] = set()


class WorkDir:
    """`root` holds `scratch` (the worker's own), `inbox` (contexts, read only to it), a canary it
    must not read, and `said`: memory the worker shares with us, where the beginning of what a cell
    prints can be found after its death."""

    def __init__(self, parent: str | None = None):
        # as the kernel names what lies in it
        parent = os.path.realpath(parent or tempfile.gettempdir())
        self.root = Path(parent) / f"{PREFIX}-{os.getuid()}-{_me()}-{secrets.token_hex(8)}"
        self.root.mkdir(mode=0o700)
        self.scratch, self.inbox, self.canary = (
            self.root / "scratch",
            self.root / "inbox",
            self.root / "canary",
        )
        self.said = self.root / "said"
        self.inbox.mkdir(mode=0o700)
        self.canary.write_text("the worker must not be able to read this\n")
        self.renew()

    def renew(self) -> None:
        """What a worker may write in, made anew: no cell has touched it. Raises OSError."""
        self.scratch.mkdir(mode=0o700, exist_ok=True)
        self.said.unlink(missing_ok=True)
        self.said.write_bytes(bytes(2 * MIRROR))

    def last_words(self) -> dict[str, str]:
        """The beginning of what the last cell printed; only worth asking when nobody else can
        say."""
        try:
            with open(self.said, "rb") as file:
                data = file.read(2 * MIRROR)
        except OSError:
            data = b""
        words = {}
        for name, part in (("stdout", data[:MIRROR]), ("stderr", data[MIRROR:])):
            size = min(int.from_bytes(part[:8], "little"), MIRROR - 8)
            words[name] = part[8 : 8 + size].decode("utf-8", "replace")
        return words

    def set_aside(self) -> Path:
        """Where the work folder of a worker that is gone lies now, to be removed (that can take a
        while)."""
        old = self.root / f"old-{secrets.token_hex(4)}"
        with suppress(FileNotFoundError):
            os.rename(self.scratch, old)
        return old

    def remove(self) -> None:
        remove(self.root)


def _me() -> str:
    """This process, in a name that stays unique: pid namespace, pid, start time (clock ticks since
    boot)."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{namespace:x}-{os.getpid()}-{started(os.getpid()) or 0}"


def started(pid: int) -> int | None:
    """When a process began; None where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def sweep(parent: str | None = None) -> None:
    """Remove the folders of hosts that are no more; once a process and folder."""
    parent = parent or tempfile.gettempdir()
    if parent in _swept:
        return
    _swept.add(parent)
    mine = _me().split("-")[0]
    pattern = re.compile(rf"{PREFIX}-{os.getuid()}-{mine}-(\d+)-(\d+)-[0-9a-f]{{16}}")
    with suppress(OSError):
        for name in os.listdir(parent):
            match = pattern.fullmatch(name)
            if (
                match
                and started(int(match[1])) != int(match[2])
                and started(os.getpid()) is not None
            ):
                path = os.path.join(parent, name)
                if os.lstat(path).st_uid == os.getuid():
                    remove(path)


def remove(path: str | Path) -> None:
    """Remove a folder tree of any depth, with any permissions in it. What cannot be removed stays,
    without an error."""
    path = os.fspath(path)
    with suppress(OSError):
        top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _flatten(top)
        finally:
            os.close(top)
        os.rmdir(path)


def _flatten(top: int) -> None:
    """Empty a folder: files go, folders inside folders are first moved up, so that no path is
    longer than two names."""
    token, count = secrets.token_hex(4), 0
    while True:
        folders = []
        for name in os.listdir(top):
            if _is_folder(name, top):
                folders.append(name)
            else:
                with suppress(OSError):
                    os.unlink(name, dir_fd=top)
        gone = 0
        for name in folders:
            with suppress(OSError):
                os.chmod(name, 0o700, dir_fd=top)  # not a link: we looked, and the worker is dead
            with suppress(OSError):
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
                try:
                    for inner in os.listdir(fd):
                        if _is_folder(inner, fd):
                            with suppress(OSError):
                                # to move a folder, its own ".." is written
                                os.chmod(inner, 0o700, dir_fd=fd)
                            count += 1
                            os.rename(inner, f"{token}-{count}", src_dir_fd=fd, dst_dir_fd=top)
                            gone += 1
                        else:
                            os.unlink(inner, dir_fd=fd)
                finally:
                    os.close(fd)
                os.rmdir(name, dir_fd=top)
                gone += 1
        if not folders or not gone:
            return


def _is_folder(name: str, where: int) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=where, follow_symlinks=False).st_mode)
    except OSError:
        return False


class Watch:
    """The files of a worker against their bound. A look at all of them takes its time; how much the
    disk has filled up since the last one takes none, and says when the next one cannot wait."""

    FASTEST = 4 << 30  # bytes a second that a worker may write

    def __init__(self, folder: Path, allowed: int, files: int):
        self._folder, self._allowed, self._files = folder, allowed, files
        # bytes at the last look, and what the disk has filled up since
        self._known = self._grown = 0
        self._free = self._free_now()

    def _free_now(self) -> int:
        try:
            disk = os.statvfs(self._folder)
        except OSError:
            return 0
        return disk.f_bfree * disk.f_frsize

    def glance(self) -> float:
        """Seconds in which the bound cannot be passed; 0 where it may have been, by this worker or
        anybody else."""
        free = self._free_now()
        # what others have freed meanwhile is not the worker's
        self._grown += max(self._free - free, 0)
        self._free = free
        return max(self._allowed - self._known - self._grown, 0) / self.FASTEST

    def look(self, pid: int) -> str | None:
        """What is wrong with the files: too many bytes on disk, named or not, too many files, too
        deep."""
        self._grown, self._free = 0, self._free_now()
        named, wrong = _measured(self._folder, self._allowed, self._files)
        if wrong is not None:
            return wrong
        nameless = unlinked(pid, self._folder, self._allowed)
        self._known = named + nameless
        if self._known > self._allowed:
            return f"more than {self._allowed >> 20} MiB in the work folder and in files without a name"
        return None


def measure(folder: Path, bytes_allowed: int, files_allowed: int) -> str | None:
    """What is wrong with a work folder: too many bytes on disk, too many files, too deep; None if
    nothing is."""
    return _measured(folder, bytes_allowed, files_allowed)[1]


def _measured(folder: Path, bytes_allowed: int, files_allowed: int) -> tuple[int, str | None]:
    """Bytes on disk, and what is wrong."""
    total, count = 0, 0
    level = [os.fspath(folder)]
    for _ in range(DEPTH):
        below: list[str] = []
        for path in level:
            try:
                with os.scandir(path) as entries:
                    for entry in entries:
                        count += 1
                        if count > files_allowed:
                            return total, f"more than {files_allowed:,} files in the work folder"
                        try:
                            status = entry.stat(follow_symlinks=False)
                        except OSError:
                            continue  # just removed
                        total += status.st_blocks * 512
                        if total > bytes_allowed:
                            return total, f"more than {bytes_allowed >> 20} MiB in the work folder"
                        if stat.S_ISDIR(status.st_mode):
                            below.append(entry.path)
            except FileNotFoundError:
                continue
            except OSError as error:
                return total, f"a folder in the work folder that cannot be read ({error.strerror})"
        if not below:
            return total, None
        level = below
    return total, f"folders nested deeper than {DEPTH} in the work folder"


def unlinked(pid: int, scratch: Path, allowed: int) -> int:
    """Bytes on disk that a process holds in files without a name, open or only mapped. 0 where they
    cannot be seen."""
    total, seen = 0, set()
    with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with suppress(OSError):
                status = os.stat(entry.path)
                if (
                    stat.S_ISREG(status.st_mode)
                    and status.st_nlink == 0
                    and status.st_ino not in seen
                ):
                    seen.add(status.st_ino)
                    total += status.st_blocks * 512
    prefix = os.fsencode(scratch) + b"/"
    with suppress(OSError), open(f"/proc/{pid}/maps", "rb") as file:
        for line in file:
            place, *_, inode, path = line.split(maxsplit=5) if prefix in line else (b"", b"", b"")
            if (
                path.startswith(prefix)
                and path.endswith(b" (deleted)\n")
                and int(inode) not in seen
            ):
                seen.add(int(inode))
                try:
                    total += os.stat(f"/proc/{pid}/map_files/{place.decode()}").st_blocks * 512
                # its size is only for privileged eyes: a page of it may stand for all that is
                # allowed
                except OSError:
                    total += allowed // 4 + 1
    return total
