"""Uploaded files: a private folder, bounded in size, number and time; each file seen only by the
key that sent it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from rlm_runtime.serve.http.admission import Admission
from rlm_runtime.serve.http.app import reply
from rlm_runtime.serve.http.errors import ApiError, refuse, stopping
from rlm_runtime.serve.http.schemas import FileDeleted, FileList, FileOut

CHUNK = 1 << 20
ID = re.compile(r"file-[0-9a-f]{32}")


@dataclass(frozen=True)
class Stored:
    id: str
    owner: str  # digest of the API key, "" without keys
    name: str  # as the client gave it
    path: Path
    bytes: int
    created: float
    expires: float
    purpose: str

    def out(self) -> FileOut:
        return FileOut(
            id=self.id,
            bytes=self.bytes,
            created_at=int(self.created),
            expires_at=int(self.expires),
            filename=self.name,
            purpose=self.purpose,
        )


class FileStore:
    """Each file is a folder `<id>/` with `meta.json` and the data. A folder without a readable
    `meta.json` is the rest of an upload that was cut off, and is removed at the start.
    """

    def __init__(self, folder: Path | None, *, one: int, all_: int, per_owner: int, seconds: float):
        self.one, self.all, self.per_owner, self.seconds = one, all_, per_owner, seconds
        self._own = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="rlm-files-")) if folder is None else folder
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._files: dict[str, Stored] = {}
        self._coming = 0  # bytes of uploads being written
        self._lock = threading.RLock()  # uploads and requests look in from threads of their own
        for entry in sorted(self.folder.glob("file-*")):
            self._recover(entry)

    @property
    def used(self) -> int:
        with self._lock:
            return sum(f.bytes for f in self._files.values()) + self._coming

    def check(self, owner: str, declared: int | None) -> None:
        """Refuse an upload before it is read. Raises ApiError (413)."""
        mine = len(self.list(owner))
        # a multipart body is a little more than its file
        if declared is not None and declared > self.one + CHUNK:
            raise self._too_large(declared)
        if mine >= self.per_owner:
            text = f"There are {self.per_owner:,} files already, which is the limit. Delete some first."
            raise ApiError(413, text, code="too_many_files", close=True)
        if self.used + (declared or 0) > self.all:
            text = "The server's space for files is used up. Delete files, or try later."
            raise ApiError(413, text, code="storage_full", close=True)

    def add(
        self, source: BinaryIO, *, name: str, purpose: str, owner: str, seconds: float | None = None
    ) -> Stored:
        """Copy an upload into the store. Blocking. Raises ApiError (413) where a bound is
        crossed."""
        file_id = "file-" + secrets.token_hex(16)
        home = self.folder / file_id
        home.mkdir(mode=0o700)
        path = home / safe_name(name)
        if path.name == "meta.json":
            path = home / "meta_.json"
        size = 0
        try:
            with open(path, "xb") as target:
                while piece := source.read(CHUNK):
                    size += len(piece)
                    with self._lock:
                        self._coming += len(piece)
                    if size > self.one:
                        raise self._too_large(size)
                    if self.used > self.all:
                        raise ApiError(
                            413, "The server's space for files is used up.", code="storage_full"
                        )
                    target.write(piece)
            now = time.time()
            stored = Stored(
                file_id,
                owner,
                name[:256],
                path,
                size,
                now,
                now + min(seconds or self.seconds, self.seconds),
                purpose,
            )
            meta = {**stored.__dict__, "path": path.name}
            (home / "meta.tmp").write_text(json.dumps(meta), encoding="utf-8")
            os.replace(home / "meta.tmp", home / "meta.json")
            with self._lock:
                self._files[file_id] = stored
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            raise
        finally:
            with self._lock:
                self._coming -= size
        return stored

    def get(self, file_id: str, owner: str) -> Stored:
        """Raises ApiError (404) also where the file is another key's."""
        self.sweep()
        stored = self._files.get(file_id)
        if stored is None or stored.owner != owner:
            raise ApiError(
                404, f"No such file: {file_id[:64]!r}.", param="file_id", code="file_not_found"
            )
        return stored

    def list(self, owner: str) -> list[Stored]:
        """Newest first."""
        self.sweep()
        with self._lock:
            mine = [f for f in self._files.values() if f.owner == owner]
        return sorted(mine, key=lambda f: (f.created, f.id), reverse=True)

    def delete(self, file_id: str, owner: str) -> None:
        self._remove(self.get(file_id, owner))

    def sweep(self) -> None:
        """Remove what is past its time."""
        now = time.time()
        with self._lock:
            old = [f for f in self._files.values() if f.expires <= now]
        for stored in old:
            self._remove(stored)

    def close(self) -> None:
        if self._own:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _remove(self, stored: Stored) -> None:
        with self._lock:
            self._files.pop(stored.id, None)
        shutil.rmtree(stored.path.parent, ignore_errors=True)

    def _too_large(self, size: int) -> ApiError:
        text = f"The file has {size:,} bytes or more; the limit of this server is {self.one:,}."
        return ApiError(413, text, param="file", code="file_too_large", close=True)

    def _recover(self, home: Path) -> None:
        try:
            meta = json.loads((home / "meta.json").read_text(encoding="utf-8"))
            stored = Stored(**{**meta, "path": home / Path(meta["path"]).name})
            if (
                not ID.fullmatch(stored.id)
                or stored.id != home.name
                or stored.path.stat().st_size != stored.bytes
            ):
                raise ValueError
        except (OSError, ValueError, TypeError, KeyError):
            shutil.rmtree(home, ignore_errors=True)
            return
        self._files[stored.id] = stored


def file_routes(files: FileStore, admission: Admission) -> list[Route]:
    """Routes to upload, list, read and delete files."""

    def owner_of(request: Request) -> str:
        return str(request.scope.get("rlm.owner", ""))

    async def upload_file(request: Request) -> Response:
        if admission.draining:
            raise stopping(close=True)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            raise ApiError(
                415,
                "A file is uploaded as multipart/form-data.",
                code="unsupported_media_type",
                close=True,
            )
        owner = owner_of(request)
        declared = request.headers.get("content-length", "")
        files.check(owner, int(declared) if declared.isdigit() else None)
        async with request.form(max_files=1, max_fields=16) as form:
            upload = form.get("file")
            if upload is None or isinstance(upload, str):
                raise refuse(
                    "The form has no file in its field `file`.",
                    "file",
                    "missing_required_parameter",
                )
            purpose = form.get("purpose", "user_data")
            if not isinstance(purpose, str) or not re.fullmatch(r"[\w.\-]{1,64}", purpose):
                raise refuse("purpose must be a short word such as user_data.", "purpose")
            seconds = expiry(
                _text(form, "expires_after[anchor]"), _text(form, "expires_after[seconds]")
            )
            stored = await asyncio.to_thread(
                files.add,
                upload.file,
                name=upload.filename or "file.txt",
                purpose=purpose,
                owner=owner,
                seconds=seconds,
            )
        return reply(stored.out())

    async def list_files(request: Request) -> Response:
        data = [f.out() for f in files.list(owner_of(request))]
        return reply(
            FileList(
                data=data,
                first_id=data[0].id if data else None,
                last_id=data[-1].id if data else None,
            )
        )

    async def get_file(request: Request) -> Response:
        return reply(files.get(request.path_params["file_id"], owner_of(request)).out())

    async def delete_file(request: Request) -> Response:
        file_id = request.path_params["file_id"]
        await asyncio.to_thread(files.delete, file_id, owner_of(request))
        return reply(FileDeleted(id=file_id))

    async def get_file_content(request: Request) -> Response:
        stored = files.get(request.path_params["file_id"], owner_of(request))
        headers = {
            "Content-Length": str(stored.bytes),
            "Content-Disposition": f'attachment; filename="{stored.path.name}"',
        }
        # Never as a type a browser would show: it is somebody's upload.
        return StreamingResponse(
            pieces(stored.path), media_type="application/octet-stream", headers=headers
        )

    return [
        Route("/v1/files", list_files),
        Route("/v1/files", upload_file, methods=["POST"]),
        Route("/v1/files/{file_id}", get_file),
        Route("/v1/files/{file_id}", delete_file, methods=["DELETE"]),
        Route("/v1/files/{file_id}/content", get_file_content),
    ]


def _text(form: FormData, name: str) -> str | None:
    value = form.get(name)
    return value if isinstance(value, str) else None


def safe_name(name: str) -> str:
    """The last component of a client's file name, in characters that mean nothing to a shell or a
    terminal."""
    name = re.sub(r"[^\w.\-]+", "_", name.replace("\\", "/").rsplit("/", 1)[-1]).lstrip(".")
    stem, dot, ending = name.rpartition(".")
    return (f"{stem[:80]}{dot}{ending[:16]}" if stem else name[:96]).strip("_") or "file.txt"


def pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as source:
        while piece := source.read(CHUNK):
            yield piece


def expiry(anchor: str | None, seconds: str | None) -> float | None:
    """The form fields `expires_after[anchor]` and `expires_after[seconds]`. Raises ApiError."""
    if anchor is None and seconds is None:
        return None
    if anchor not in (None, "created_at"):
        raise refuse("expires_after.anchor must be created_at.", "expires_after.anchor")
    try:
        value = int(seconds or "")
    except ValueError:
        value = 0
    if not 1 <= value <= 2**31:
        raise refuse(
            "expires_after.seconds must be a whole number of seconds, 1 or more.",
            "expires_after.seconds",
        )
    return float(value)
