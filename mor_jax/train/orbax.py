"""What Orbax needs to be told, and what of it has to be kept from the user."""

from __future__ import annotations

import errno
import functools
import logging
import os
import sys
from typing import Any

import jax
from etils import epath

from mor_jax.paths import scheme_of

_LOG = logging.getLogger(__name__)
TMP = ".orbax-checkpoint-tmp"
_PHRASES = tuple(
    os.strerror(e)
    for e in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO)
)
FULL = _PHRASES[:2]
# Bytes that are on their way to the disk at once, at least the largest array: without a bound the
# writers hold a copy of the whole state.
IN_FLIGHT = 128 << 20


@functools.cache
def library() -> Any:
    """Import Orbax (0.4 s) when it is first needed, and keep its log lines out of the user's
    terminal.

    It logs through absl's logger, with tracebacks of what is reported here as one sentence; the
    filters drop what comes from its files and nothing else.
    """
    import orbax.checkpoint as ocp

    home = os.path.dirname(ocp.__file__)
    logging.getLogger("absl").addFilter(lambda record: not record.pathname.startswith(home))

    # When one of several reads or writes fails Orbax drops the others and closes its event loop.
    # Asyncio then logs their exceptions, and Python prints those of their coroutines and of
    # TensorStore's callbacks (object None).
    # A future of TensorStore has no traceback; its message names the store's specification.
    marks = (home, "tensorstore_spec")
    logging.getLogger("asyncio").addFilter(
        lambda record: not any(mark in logging.Formatter().format(record) for mark in marks)
    )
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        theirs = code is not None and code.co_filename.startswith(home)
        if not theirs and (
            unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed"
        ):
            previous(unraisable)

    sys.unraisablehook = hook
    _serve_s3()
    if host := os.environ.get("STORAGE_EMULATOR_HOST"):  # what the other clients go by
        os.environ.setdefault(
            "TENSORSTORE_GCS_HTTP_URL", host if "://" in host else f"http://{host}"
        )
    return ocp


def manager(directory: epath.Path, keep: int, state: Any) -> Any:
    """A `CheckpointManager` that saves such a state and keeps the newest `keep` steps."""
    ocp = library()
    largest = max((x.nbytes for x in jax.tree.leaves(state)), default=0)
    limit = max(IN_FLIGHT, largest + 1)  # Orbax wants room for more than any one array
    handlers = {
        "state": ocp.StandardCheckpointHandler(save_concurrent_gb=limit / 10**9),
        "meta": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=True,
        # a damaged metadata file must not stop the run before it starts
        lightweight_initialize=True,
        # In the background, a failed mkdir would leave the writers waiting for it for 20
        # minutes.
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
    )
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def reason(error: BaseException) -> str:
    """What the operating system said, without the page of status text TensorStore and Orbax wrap it
    in."""
    text = f"{error} {error.__cause__ or ''} {error.__context__ or ''}"
    for phrase in _PHRASES:
        if phrase in text:
            return phrase
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}".rstrip(": ").rstrip(".")


def _serve_s3() -> None:
    """Teach Orbax that s3:// is an object store like gs://, which it knows: files under their final
    names and a commit file at the end, arrays through TensorStore's own driver.

    Orbax 0.12 has no public way. Where its private names are others, saving to s3:// fails and says
    so; all else works.
    """
    try:
        from orbax.checkpoint._src.path import gcs_utils
        from orbax.checkpoint._src.serialization import tensorstore_utils

        plain, normal = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path
        prefixes, _ = gcs_utils._GCS_PATH_PREFIX, tensorstore_utils._use_gcs_driver
    except (ImportError, AttributeError) as e:
        _LOG.warning(
            "this version of Orbax cannot be taught s3:// (%s); use gs:// or the tested set of packages.",
            e,
        )
        return
    ours = "s3://"
    gcs_utils._GCS_PATH_PREFIX = (*prefixes, ours)
    gcs_utils.get_kvstore_for_gcs = lambda path: (
        _s3_store(path) if path.startswith(ours) else plain(path)
    )
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(("gs://", ours))
    tensorstore_utils._normalize_path = lambda path: (
        normal(path).replace("s3:/", ours) if scheme_of(path) else normal(path)
    )


def _s3_store(path: str) -> dict[str, Any]:
    """TensorStore's specification of an s3:// directory, with what the environment says of region,
    endpoint and keys."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    store: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": key}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        store |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        store["aws_region"] = region
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # else TensorStore looks for profiles and machine roles
        store["aws_credentials"] = {"type": "environment"}
    return store
