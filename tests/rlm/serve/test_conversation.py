"""From messages and files to context and question, by the rule that docs/rlm.md states."""

import base64
import gzip
import json

import pytest

from rlm_runtime.errors import ContextError
from rlm_runtime.serve.http.errors import ApiError
from rlm_runtime.serve.http.files import safe_name
from rlm_runtime.serve.rlm.conversation import build
from rlm_runtime.serve.rlm.schemas import ChatRequest

LIMIT = 200
LONG = "begin " + "filler " * 100 + "end?"


def task(tmp_path, messages, files=None, **rlm):
    request = ChatRequest.model_validate(
        {"model": "m", "messages": messages, **({"rlm": rlm} if rlm else {})}
    )

    def find(file_id):
        path = tmp_path / (files or {})[file_id]
        return path, path.name

    return build(request, folder=tmp_path, find=find, question_chars=LIMIT)


def user(content):
    return {"role": "user", "content": content}


def texts(*parts):
    return user([{"type": "text", "text": p} for p in parts])


def inline(text, name="a.txt"):
    data = "data:text/plain;base64," + base64.b64encode(text.encode()).decode()
    return {"type": "file", "file": {"file_data": data, "filename": name}}


def content_of(context):
    return {name: path.read_text() for name, path in context.files}


def test_a_short_conversation_is_the_context_and_its_last_user_text_the_question(tmp_path):
    made = task(tmp_path, [user("one"), {"role": "assistant", "content": "two"}, user("three?")])
    assert made.question == "three?" and made.context.kind == "messages"
    assert made.context.value == [
        user("one"),
        {"role": "assistant", "content": "two"},
        user("three?"),
    ]


def test_parts_before_the_last_are_the_material(tmp_path):
    made = task(tmp_path, [texts(LONG, "and this", "what?")])
    assert (made.context.kind, made.context.value, made.question) == (
        "str",
        f"{LONG}\n\nand this",
        "what?",
    )


def test_one_long_message_is_the_context_and_both_its_ends_are_shown(tmp_path):
    made = task(tmp_path, [user(LONG)])
    assert (made.context.kind, made.context.value) == ("str", LONG)
    assert (
        "begin" in made.question
        and made.question.endswith("end?")
        and len(made.question) < len(LONG)
    )


def test_the_question_may_be_given_apart(tmp_path):
    made = task(tmp_path, [user(LONG)], question="how many?")
    assert (made.context.value, made.question) == (LONG, "how many?")


def test_instructions_come_before_the_question(tmp_path):
    made = task(tmp_path, [{"role": "system", "content": "Be brief."}, texts("the text", "what?")])
    assert made.question == "Be brief.\n\nwhat?" and made.context.value == "the text"


def test_long_instructions_are_material_and_are_not_lost(tmp_path):
    made = task(tmp_path, [{"role": "developer", "content": LONG}, user("what?")])
    assert made.context.kind == "messages" and made.context.value[0]["content"] == LONG
    assert made.question.endswith("what?") and LONG not in made.question


def test_one_file_is_the_context(tmp_path):
    made = task(tmp_path, [user([inline("hello"), {"type": "text", "text": "what?"}])])
    assert (
        made.context.kind == "file"
        and made.context.path.read_text() == "hello"
        and made.question == "what?"
    )


def test_a_file_and_earlier_messages_are_a_folder(tmp_path):
    earlier = [user("one"), {"role": "assistant", "content": "two"}]
    made = task(tmp_path, [*earlier, user([inline("hello"), {"type": "text", "text": "what?"}])])
    files = content_of(made.context)
    assert files["a.txt"] == "hello"
    assert [m["content"] for m in json.loads(files["conversation.json"])] == ["one", "two", "what?"]


def test_files_of_one_name_stay_apart_and_of_every_spelling(tmp_path):
    (tmp_path / "up.txt").write_text("uploaded")
    file_id = "file-" + "0" * 32
    parts = [
        inline("1"),
        inline("2"),
        {"type": "input_file", "file_data": base64.b64encode(b"3").decode()},
    ]
    made = task(
        tmp_path,
        [user([*parts, {"type": "file", "file": {"file_id": file_id}}]), user("what?")],
        files={file_id: "up.txt"},
        context_file_ids=[file_id],
    )
    files = content_of(made.context)
    assert sorted(files.values())[:4] == ["1", "2", "3", files["conversation.json"]]
    assert list(files.values()).count("uploaded") == 2 and len(files) == 6


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "x"}],
        [user("")],
        [user([])],
        [user([{"type": "file", "file": {}}])],
        [user([{"type": "file", "file": {"file_data": "***"}}])],
        [user([{"type": "file", "file": {"file_data": "data:text/plain,abc"}}])],
        [user([{"type": "image_url", "image_url": {"url": "x"}}])],
    ],
)
def test_what_cannot_be_used_is_refused_by_name(tmp_path, messages):
    with pytest.raises(ApiError) as e:
        task(tmp_path, messages)
    assert e.value.status == 400 and e.value.param


@pytest.mark.parametrize(
    "data",
    [b"", bytes(range(256)) * 20, gzip.compress(b"text " * 100)],
    ids=["empty", "binary", "gzip"],
)
@pytest.mark.parametrize("others", [[], [inline("fine")]], ids=["alone", "among"])
def test_files_without_text_are_refused(tmp_path, data, others):
    part = {"type": "file", "file": {"file_data": base64.b64encode(data).decode()}}
    with pytest.raises((ContextError, ApiError)):
        task(tmp_path, [user([*others, part, {"type": "text", "text": "q"}])])


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "..\\..\\x", "/abs", "a\x00b", "\x1b[31m.txt", "", ".", "..", "ü" * 500],
)
def test_names_of_clients_are_made_safe(name):
    safe = safe_name(name)
    assert (
        safe
        and "/" not in safe
        and not safe.startswith(".")
        and safe.isprintable()
        and len(safe) <= 100
    )
