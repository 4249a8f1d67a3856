"""Cells as models write them: awaits on helpers that answer at once, imports of what is there, one
call for many."""

import pytest

from .harness import one, play, printed


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("print(await llm_query('a'))", "a\n"),
        ("await llm_query('a')", "'a'\n"),
        ("x = [await llm_query(p) for p in 'ab']\nprint(x)", "['a', 'b']\n"),
        (
            "import asyncio\nasync def f(p):\n    return await llm_query(p) + '!'\nprint(asyncio.run(f('a')))",
            "a!\n",
        ),
        (
            "import asyncio\nprint(await asyncio.sleep(0, 'slept'), await llm_query('a'))",
            "slept a\n",
        ),
        ("if (await rlm_query('a', 'q')) == 'a':\n    print((await llm_batch(['b']))[0])", "b\n"),
        ("from rlm import llm_query\nprint(llm_query('a'))", "a\n"),
        (
            "from rlm_utils.tools import llm_query as ask, llm_batch, context\nprint(ask('a'), llm_batch(['b']))",
            "a ['b']\n",
        ),
        ("def f():\n    from rlm import llm_query as q\n    return q('a')\nprint(f())", "a\n"),
        (
            "try:\n    from rlm import llm_query\nexcept ImportError:\n    print('no')\nprint(llm_query('a'))",
            "a\n",
        ),
        ("print(llm_query(['a', 'b']), llm_query(('c',)))", "['a', 'b'] ['c']\n"),
        (
            "print(llm_query([1, 'a']), llm_query([{'role': 'user', 'content': 'a'}]))",
            "[1, 'a'] [{'role': 'user', 'content': 'a'}]\n",
        ),
    ],
)
def test_the_cell_does_what_its_author_meant(code, shown):
    assert printed(one(code)) == shown


def test_what_python_means_stays():
    strange = "await 'text'"
    assert one(strange).error.type == "TypeError"
    missing = one("from rlm import llm_query, something_else")
    assert missing.error.type == "ModuleNotFoundError" and "'rlm'" in missing.error.message
    assert printed(one("from json import loads as llm_query\nprint(llm_query('[1]'))")) == "[1]\n"


def test_a_line_keeps_its_number_in_an_error():
    first, second = play("from rlm import llm_query\nawait llm_query('a')\n1 / 0", "print('on')")
    assert "line 3" in first.error.traceback and printed(second) == "on\n"
