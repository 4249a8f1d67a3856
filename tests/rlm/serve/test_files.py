"""Uploads: what comes back is what was sent, seen by its owner only, within bounds, and gone after
its time."""

import io
import time

import openai
import pytest

from rlm.serve.support import Scripted, running
from rlm_runtime.serve.http.errors import ApiError
from rlm_runtime.serve.http.files import FileStore


def client(server, key="none"):
    return openai.OpenAI(
        base_url=server.url, api_key=key, max_retries=0, _strict_response_validation=True
    )


def test_upload_list_read_use_delete():
    model = Scripted("rlm")
    with running(model) as server:
        c = client(server)
        text = "line é\n" * 300_000
        sent = c.files.create(file=("my notes.txt", text.encode()), purpose="user_data")
        assert (
            sent.bytes == len(text.encode())
            and sent.filename == "my notes.txt"
            and sent.status == "processed"
        )
        assert [f.id for f in c.files.list()] == [sent.id]
        assert c.files.retrieve(sent.id).id == sent.id
        assert c.files.content(sent.id).read() == text.encode()
        part = {"type": "file", "file": {"file_id": sent.id}}
        c.chat.completions.create(
            model="rlm",
            messages=[{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}],
        )
        c.chat.completions.create(
            model="rlm",
            messages=[{"role": "user", "content": "again?"}],
            extra_body={"rlm": {"context_file_ids": [sent.id]}},
        )
        assert c.files.delete(sent.id).deleted
        with pytest.raises(openai.NotFoundError):
            c.files.retrieve(sent.id)
    assert [s["text"] for s in model.gate.seen] == [text, text]
    assert [s["question"] for s in model.gate.seen] == ["what?", "again?"]


def test_a_deleted_file_stays_readable_for_the_run_that_has_it():
    model = Scripted("rlm", act=lambda context, q, g: context.path.read_text())
    model.gate.closed = True
    with running(model) as server:
        c = client(server)
        sent = c.files.create(file=("a.txt", b"still here"), purpose="user_data")
        connection = server.open_chat(rlm={"context_file_ids": [sent.id]})
        model.gate.wait_for(lambda: model.gate.started)
        c.files.delete(sent.id)
        model.gate.opened.set()
        assert b"still here" in connection.getresponse().read()
        connection.close()


def test_files_of_another_key_do_not_exist():
    with running(Scripted("rlm"), api_keys=("alice", "bob")) as server:
        sent = client(server, "alice").files.create(file=("a.txt", b"secret"), purpose="user_data")
        bob = client(server, "bob")
        assert list(bob.files.list()) == []
        for use in (bob.files.retrieve, bob.files.content, bob.files.delete):
            with pytest.raises(openai.NotFoundError):
                use(sent.id)
        with pytest.raises(openai.NotFoundError):
            bob.chat.completions.create(
                model="rlm",
                messages=[{"role": "user", "content": "what?"}],
                extra_body={"rlm": {"context_file_ids": [sent.id]}},
            )
        assert client(server, "alice").files.content(sent.id).read() == b"secret"


def test_bounds_of_size_number_and_space():
    with running(
        Scripted("rlm"), file_bytes=3_000_000, files_bytes=5_000_000, files_per_key=3
    ) as server:
        c = client(server)
        with pytest.raises(openai.APIStatusError) as e:
            c.files.create(file=("a.txt", b"x" * 3_000_001), purpose="user_data")
        assert e.value.status_code == 413 and e.value.code == "file_too_large"
        c.files.create(file=("a.txt", b"x" * 3_000_000), purpose="user_data")
        with pytest.raises(openai.APIStatusError) as e:
            c.files.create(file=("a.txt", b"x" * 2_500_000), purpose="user_data")
        assert e.value.status_code == 413 and e.value.code == "storage_full"
        for _ in range(2):
            c.files.create(file=("a.txt", b"x"), purpose="user_data")
        with pytest.raises(openai.APIStatusError) as e:
            c.files.create(file=("a.txt", b"x"), purpose="user_data")
        assert e.value.status_code == 413 and e.value.code == "too_many_files"
        assert server.files.used == 3_000_002
        assert len(list(server.files.folder.iterdir())) == 3, (
            "a refused upload left something behind"
        )


def test_a_form_that_is_none_is_400():
    with running(Scripted("rlm")) as server:
        form = {"Content-Type": "multipart/form-data; boundary=b"}
        bodies = [
            b"",
            b"nonsense",
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nx\r\n--b--\r\n',
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n'
            b'--b\r\nContent-Disposition: form-data; name="expires_after[seconds]"\r\n\r\nsoon\r\n--b--\r\n',
        ]
        for body in bodies:
            assert server.request("POST", "/v1/files", body, form)[0] == 400, body
        assert (
            server.request("POST", "/v1/files", b"{}", {"Content-Type": "application/json"})[0]
            == 415
        )
        assert (
            server.request("POST", "/v1/files", b"x", {"Content-Type": "multipart/form-data"})[0]
            == 400
        )
        assert server.files.used == 0


def store(folder, **bounds):
    return FileStore(
        folder, **{"one": 1000, "all_": 2000, "per_owner": 5, "seconds": 100.0, **bounds}
    )


def test_files_survive_a_restart_and_broken_ones_are_swept(tmp_path):
    first = store(tmp_path)
    kept = first.add(io.BytesIO(b"kept"), name="../a b.txt", purpose="user_data", owner="o")
    (tmp_path / ("file-" + "1" * 32)).mkdir()  # an upload that was cut off
    short = first.add(io.BytesIO(b"short"), name="b", purpose="user_data", owner="o")
    short.path.write_bytes(b"s")
    again = store(tmp_path)
    assert [f.id for f in again.list("o")] == [kept.id]
    assert (
        again.get(kept.id, "o").path.read_bytes() == b"kept"
        and again.get(kept.id, "o").name == "../a b.txt"
    )
    assert [p.name for p in tmp_path.iterdir()] == [kept.id]


def test_files_end_with_their_time(tmp_path):
    files = store(tmp_path)
    sent = files.add(io.BytesIO(b"x"), name="a", purpose="user_data", owner="o", seconds=1e-6)
    time.sleep(0.001)
    with pytest.raises(ApiError):
        files.get(sent.id, "o")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_upload_gives_its_space_back(tmp_path):
    class Broken(io.BytesIO):
        def read(self, size=-1):
            data = super().read(100)
            if not data:
                raise OSError("gone")
            return data

    files = store(tmp_path)
    with pytest.raises(OSError, match="gone"):
        files.add(Broken(b"x" * 300), name="a", purpose="user_data", owner="o")
    assert files.used == 0 and list(tmp_path.iterdir()) == []


def test_a_private_folder_ends_with_the_store():
    files = store(None)
    files.add(io.BytesIO(b"x"), name="a", purpose="user_data", owner="o")
    assert files.folder.stat().st_mode & 0o777 == 0o700
    files.close()
    assert not files.folder.exists()
