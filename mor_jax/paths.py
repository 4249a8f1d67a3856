"""Where files live: one kind of path for this machine, Google Cloud Storage and S3.

`as_path` gives an `etils.epath.Path`, which reads and writes `gs://` and `s3://` through fsspec.
Object stores differ from a file system in three ways that callers must know: a directory exists
only through what lies in it, nothing can be appended to an object, and the write of one object is
atomic while a rename of many is not.

S3-compatible stores are reached with `AWS_ENDPOINT_URL`, a Cloud Storage emulator with
`STORAGE_EMULATOR_HOST`.
"""

from __future__ import annotations

import functools
import os
import re
from typing import Any

from etils import epath

from mor_jax.errors import UserError

# Scheme: the package that serves it, and our extra that brings it.
SERVED = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# One slash is what `pathlib` leaves of two.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/(?=/)|(gs|s3):/(?=[^/])")


def scheme_of(path: str | os.PathLike[str]) -> str:
    """The scheme of a remote address in lower case; "" for a path of this machine."""
    found = _SCHEME.match(os.fspath(path))
    return (found[1] or found[2]).lower() if found else ""


def is_local(path: str | os.PathLike[str]) -> bool:
    return scheme_of(path) in ("", "file")


def as_path(path: str | os.PathLike[str]) -> epath.Path:
    """The path of a file or directory, here or in an object store whose bucket has been reached.

    Raises:
      UserError: nothing serves such an address, its package is not installed, or its bucket cannot
        be reached.
    """
    text, scheme = os.fspath(path), scheme_of(path)
    if not scheme:
        return epath.Path(os.path.expanduser(text))
    rest = text.partition(":")[2].lstrip("/")
    if scheme == "file":
        return epath.Path("/" + rest)
    if scheme not in SERVED:
        known = ", ".join(f"{name}://" for name in SERVED)
        raise UserError(
            f"{text}: nothing here serves {scheme}://. Give a local path, or one of {known}."
        )
    bucket = "" if ":///" in text else rest.partition("/")[0]
    if not bucket:
        raise UserError(f"{text} names no bucket; the form is {scheme}://bucket/directory.")
    _reach(scheme, bucket)
    return epath.Path(f"{scheme}://{rest.rstrip('/')}")


def filesystem(path: str | os.PathLike[str]) -> Any:
    """The fsspec file system of a remote address. Raises UserError if its package is not
    installed."""
    scheme = scheme_of(path)
    import fsspec

    # What other processes write must be seen, so directory listings are not kept. Set before the
    # first use, since fsspec keeps one instance for each set of options, and epath asks for the
    # same one.
    for name in ("gs", "gcs", "s3"):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    try:
        return fsspec.filesystem(scheme)
    except ImportError as e:
        package, extra = SERVED.get(scheme, ("", ""))
        need = (
            f'the package {package}: pip install ".[{extra}]"'
            if package
            else f"another package ({e})"
        )
        raise UserError(f"{os.fspath(path)}: {scheme}:// needs {need}.") from None
    except ValueError as e:
        raise UserError(f"{os.fspath(path)}: nothing here serves {scheme}:// ({e}).") from e


@functools.cache
def _reach(scheme: str, bucket: str) -> None:
    """Ask for a bucket once in a process, so that a wrong address costs seconds and not the first
    save."""
    address = f"{scheme}://{bucket}"
    store = filesystem(address)
    try:
        found = store.exists(address) if scheme == "gs" else bool(store.info(address))
    except PermissionError:
        return  # it has answered; what is in it may be allowed
    except FileNotFoundError:
        found = False
    except Exception as e:  # each client has its own kinds for credentials, networks and answers
        raise UserError(
            f"{address} cannot be reached: {reason(e)}. Check the network, the credentials and the address."
        ) from e
    if not found:
        raise UserError(f"{address}: there is no such bucket, or these credentials may not see it.")


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".rstrip(": ").rstrip(".")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole file so that a reader, or a kill, never meets half of it. Its directory is
    made."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """As `write_text`. Raises OSError."""
    target = epath.Path(path)
    if not is_local(target):
        target.write_bytes(data)  # one object, atomic
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    draft.write_bytes(data)
    os.replace(draft, target)


def move(source: epath.Path, target: epath.Path) -> None:
    """Rename a directory; in an object store, copy every object there and delete it. Raises
    OSError."""
    if is_local(source):
        source.rename(target)
        return
    store = filesystem(source)
    try:
        for name in store.find(os.fspath(source)):
            rest = store.unstrip_protocol(name).removeprefix(f"{os.fspath(source)}/")
            store.copy(name, os.fspath(target / rest))
        store.rm(os.fspath(source), recursive=True)
    except OSError:
        raise
    except Exception as e:  # each client has its own kinds
        raise OSError(reason(e)) from e


def steps_in(directory: epath.Path) -> bool:
    """Whether a directory of checkpoints holds anything that looks like one, finished or not."""
    try:
        return any(child.name[:1].isdecimal() for child in directory.iterdir())
    except OSError:
        return False


def use_compilation_cache() -> None:
    """Keep compiled programs between processes, in $MOR_JAX_CACHE or ~/.cache/mor_jax; where the
    user has set JAX's own directory for them, there."""
    import jax

    if jax.config.values.get("jax_compilation_cache_dir") is None:
        root = as_path(os.environ.get("MOR_JAX_CACHE") or "~/.cache/mor_jax")
        jax.config.update("jax_compilation_cache_dir", str(root / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
