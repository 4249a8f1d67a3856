"""The REPL as a model uses it: names that stay, the last expression, errors, output, the answer,
imports."""

import asyncio

import pytest

from rlm.repl.harness import children, one, play, printed, run
from rlm_runtime.context import Context
from rlm_runtime.repl import make


def test_names_stay_also_those_bound_before_an_error_and_those_with_an_underscore():
    first, second = play("x = 5\n_y = 6\ndef f(): return x\nraise ValueError('no')", "(x, _y, f())")
    assert (
        first.status == "error" and first.error.type == "ValueError" and first.error.message == "no"
    )
    assert printed(second) == "(5, 6, 5)\n"


def test_the_last_expression_is_shown_and_nothing_else():
    assert printed(one("1\n2\n'three'")) == "'three'\n"
    assert printed(one("3;")) == "3\n"
    assert printed(one("None")) == ""
    assert printed(one("x = 3")) == ""
    assert printed(one("")) == ""
    assert printed(one("# only a comment")) == ""


def test_the_context_is_there_and_is_what_was_given():
    assert printed(one("context", context="é😀\n")) == "'é😀\\n'\n"
    assert printed(one("context", context=b"\x00\xff")) == "b'\\x00\\xff'\n"
    assert printed(one("context['a'][1]", context={"a": [1, {"b": None}]})) == "{'b': None}\n"


def test_a_file_is_read_in_place_and_a_folder_is_a_mapping(tmp_path):
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_text("one\ntwo\n")
    large.write_text("line\n" * 4_000_000)
    assert (
        printed(one("type(context).__name__, context", context=small))
        == "('str', 'one\\ntwo\\n')\n"
    )
    assert (
        printed(one("len(context), context[5:9], context.find('nope')", context=large))
        == "(20000000, 'line', -1)\n"
    )
    assert printed(one("sorted(context), context['small.txt']", context=tmp_path)).startswith(
        "(['large.txt', 'small"
    )
    assert printed(one("sorted(context), context['small.txt']", context=[small, large])).startswith(
        "(['large.txt'"
    )


def test_a_traceback_shows_the_cell_and_nothing_of_the_runtime():
    result = one(
        "import json\ndef f(x):\n    return json.loads(x)\ntry:\n    f('{')\nexcept ValueError as e:\n    1 / 0"
    )
    trace = result.error.traceback
    assert '  File "<cell 0>", line 7, in <module>\n    1 / 0\n' in trace
    assert "return json.loads(x)" in trace and "ZeroDivisionError: division by zero" in trace
    assert trace.index("JSONDecodeError") < trace.index("ZeroDivisionError")
    assert "worker" not in trace and "guarded" not in trace and "decoder.py" not in trace


def test_a_syntax_error_points_at_its_place():
    result = one("x = 1\ny = (1,\nz = )")
    assert result.error.type == "SyntaxError" and "^" in result.error.traceback
    assert result.variables == {}


@pytest.mark.parametrize(
    "cell",
    [
        "raise SystemExit(3)",
        "import sys; sys.exit('bye')",
        "raise KeyboardInterrupt",
        "raise BaseException('odd')",
        "raise GeneratorExit",
        "class E(Exception):\n    def __str__(self): raise RuntimeError\nraise E",
        "class E(Exception):\n    def __str__(self): return 5\nraise E",
        "class M(type):\n    def __getattribute__(c, n): raise ValueError\n"
        "class E(Exception, metaclass=M): pass\nraise E('x')",
        "raise ExceptionGroup('many', [ValueError(i) for i in range(1000)])",
        "def f(): f()\nf()",
        "class S(str):\n    def __len__(self): return -1\nraise ValueError(S('x'))",
        "e = ValueError('a'); e.__cause__ = e; raise e",
        "e = ValueError('a'); e.__notes__ = [1, 'note', 'x' * 10**7]; raise e",
        "raise ValueError('x' * 10**8)",
        "x = " + "(" * 500 + ")" * 500,
        "x = " + "-" * 100_000 + "1",
        "\x00",
        "'\\ud800'.encode()",
        "return 5",
        "await 5",
        "del __builtins__\ndef f(): return len('')\nraise ValueError",
    ],
)
def test_whatever_is_raised_is_an_error_and_the_repl_goes_on(cell):
    before, result, after = play("kept = 1", cell, "kept")
    assert before.status == "ok"
    assert (
        result.status == "error"
        and len(result.error.message) < 5000
        and len(result.error.traceback) < 12000
    )
    assert after.stdout == "1\n"


def test_output_is_cut_in_the_middle_and_the_whole_stays_in_the_repl():
    first, second = play(
        "print('a' * 60_000 + 'b' * 60_000)", "len(outputs[0]), outputs[0][60_000]"
    )
    assert first.stdout_chars == 120_001
    assert first.stdout.startswith("a" * 10_000 + "\n[") and first.stdout.endswith(
        "b" * 9_999 + "\n"
    )
    assert "100,001 characters hidden; the variable outputs[0] holds all of it" in first.stdout
    assert printed(second) == "(120001, 'b')\n"


def test_output_beyond_what_is_kept_says_so():
    first, second = play(
        "for i in range(10): print(str(i) * 99)",
        "outputs[0].split('[')[1]",
        limits={"output_chars": 100, "kept_chars": 300},
    )
    assert "outputs[0] holds the beginning and the end" in first.stdout
    assert first.stdout.startswith("0" * 50) and first.stdout.endswith("9" * 49 + "\n")
    assert "600 characters were not kept" in printed(second)


def test_a_hundred_megabytes_of_output_leave_host_and_worker_small():
    def most_memory(pid: int | str) -> int:  # MB
        with open(f"/proc/{pid}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) >> 10

    async def go():
        before = most_memory("self")
        async with make("local") as environment:
            await environment.start(Context.of("x"))
            result = await run(environment, "for i in range(1000): print('x' * 100_000)")
            assert result.stdout_chars == 100_001_000 and len(result.stdout) < 21_000
            (worker,) = children()
            assert most_memory(worker) < 60
        assert most_memory("self") - before < 30

    asyncio.run(go())


def test_a_cell_may_await_at_its_top():
    code = "import asyncio\nasync def f(x):\n    await asyncio.sleep(0.001)\n    return x\nx = await f(2)\nx + await f(3)"
    assert printed(one(code)) == "5\n"


def test_output_past_the_streams_is_caught_too():
    result, after = play(
        "import os\nos.write(1, b'raw\\n'); os.write(2, b'\\xffbad\\n'); print('py')", "outputs[0]"
    )
    assert result.stdout == "py\nraw\n" and result.stderr == "\ufffdbad\n"
    assert printed(after) == "'py\\nraw\\n'\n"
    flood = one("import os\nfor i in range(300): os.write(1, b'y' * 100_000)")
    assert flood.stdout_chars == 30_000_000 and len(flood.stdout) < 21_000


def test_streams_behave_as_streams():
    code = """
    import sys, io, contextlib, logging, warnings
    sys.stdout.buffer.write(b'bytes\\n'); sys.stdout.writelines(['a', 'b\\n']); sys.stdout.flush()
    print('to', 'stderr', file=sys.stderr); print(sys.stdout.isatty(), sys.stdout.encoding, sys.stdout.fileno())
    with contextlib.redirect_stdout(io.StringIO()) as inner: print('inner')
    logging.warning('logged'); warnings.warn('warned')
    sys.stdout.close(); print('still here'); print(repr(sys.stdin.read()))
    """
    result = one(code)
    assert printed(result) == "bytes\nab\nFalse utf-8 1\nstill here\n''\n"
    assert "to stderr" in result.stderr and "logged" in result.stderr and "warned" in result.stderr


def test_the_answer_comes_back_as_json():
    cells = [
        "answer['content'] = 'draft'",
        "answer['content'] = {'a': (1, 2), 3: {4}}; answer['ready'] = True",
    ]
    first, second = play(*cells)
    assert first.answer.content == "draft" and not first.answer.ready
    assert second.answer.content == {"a": [1, 2], "3": [4]} and second.answer.ready
    assert one("answer = {'content': 7, 'ready': True}").answer.model_dump() == {
        "content": 7,
        "ready": True,
    }
    assert one("FINAL([1])").answer.model_dump() == {"content": [1], "ready": True}
    assert one("x = {'k': 1}\nFINAL_VAR('x')").answer.content == {"k": 1}
    assert one("x = 1.5\nFINAL_VAR(x)").answer.content == 1.5
    assert one("FINAL(None)").answer.ready
    both = one("FINAL('done')\n1 / 0")
    assert both.answer.ready and both.status == "error"


@pytest.mark.parametrize(
    "value",
    [
        "object()",
        "float('nan')",
        "float('inf')",
        "{(1, 2): 3}",
        "b'\\xff'",
        "[[]] * 3 + [lambda: 0]",
        "10 ** 5000",
        "loop",
        "answer",
        "'x' * 40_000_000",
        "Bad()",
    ],
)
def test_an_answer_that_is_no_json_goes_back_to_the_model(value):
    setup = "loop = []; loop.append(loop)\nclass Bad(dict):\n    def items(self): raise RuntimeError('no')\n"
    result, after = play(
        f"{setup}answer['content'] = {value}; answer['ready'] = True", "answer['ready']"
    )
    assert result.status == "error" and not result.answer.ready and result.answer.content is None
    assert result.error.message
    assert printed(after) == "False\n"


def test_answer_that_is_no_dict_is_explained():
    result, after = play("answer = 42", "answer")
    assert result.answer.content == 42 and not result.answer.ready
    assert "answer['ready'] = True" in result.stderr
    assert printed(after) == "{'content': 42, 'ready': False}\n"


def test_values_people_use_have_a_json_form():
    code = """
    import dataclasses, datetime, decimal, enum, pathlib, collections
    @dataclasses.dataclass
    class P: x: int; y: list
    class C(enum.Enum): RED = 'red'
    N = collections.namedtuple('N', 'a b')
    FINAL([P(1, [2]), C.RED, N(1, 2), datetime.date(2024, 1, 2), decimal.Decimal('1.5'), pathlib.Path('a'), range(3),
           {'b': 1}.keys(), collections.Counter('aab'), collections.deque([1]), True, b'text', frozenset({2, 1})])
    """
    assert one(code).answer.content == [
        {"x": 1, "y": [2]},
        "red",
        [1, 2],
        "2024-01-02",
        "1.5",
        "a",
        [0, 1, 2],
        ["b"],
        {"a": 2, "b": 1},
        [1],
        True,
        "text",
        [1, 2],
    ]


def test_helpers_come_back_and_the_model_is_told():
    result, after = play(
        "llm_query = FINAL = 3\ncontext = 'other'", "llm_query('x'), context, callable(FINAL)"
    )
    assert "FINAL, context, llm_query" in result.stderr
    assert printed(after) == "('x', 'some text', True)\n"


def test_variables_are_listed_with_type_and_size():
    result = one(
        "import os\na = [1] * 12\nb = 'x' * 2000\ndef f(): 0\nclass K: 0\n_hidden = 1\nd = {}"
    )
    assert result.variables == {
        "a": "list, 12 items",
        "b": "str, 2,000 characters",
        "f": "function",
        "K": "class",
        "d": "dict, 0 items",
    }
    assert "a: list, 12 items" in printed(play("a = [1] * 12", "print(SHOW_VARS())")[1])
    many = one("for i in range(1000): globals()[f'v{i}'] = i")
    assert len(many.variables) <= 201


def test_asyncio_threads_and_the_usual_modules_work():
    code = """
    import asyncio, threading, sqlite3, hashlib, tempfile, os, zoneinfo, datetime, statistics, uuid, re, csv, html.parser
    async def double(x):
        await asyncio.sleep(0.001)
        return await asyncio.to_thread(lambda: 2 * x)
    async def main(): return await asyncio.gather(*(double(i) for i in range(4)))
    print(asyncio.run(main()))
    with tempfile.NamedTemporaryFile('w', suffix='.txt') as f: f.write('x'); f.flush(); print(os.path.getsize(f.name))
    print(sqlite3.connect('t.db').execute('select 1 + 1').fetchone(), hashlib.sha256(b'').hexdigest()[:6])
    print(datetime.datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo('Europe/Paris')).utcoffset())
    found = []
    threads = [threading.Thread(target=found.append, args=(i,)) for i in range(30)]
    [t.start() for t in threads]; [t.join() for t in threads]
    len(found)
    """
    assert printed(one(code)) == "[0, 2, 4, 6]\n1\n(2,) e3b0c4\n2:00:00\n30\n"


def test_the_work_folder_can_be_worked_in():
    code = """
    import os, shutil, pathlib
    os.makedirs('a/b'); pathlib.Path('a/b/f.txt').write_text('hi'); os.rename('a/b/f.txt', 'a/g.txt')
    os.rmdir('a/b'); shutil.copyfile('a/g.txt', 'h.txt'); shutil.rmtree('a'); sorted(os.listdir('.'))
    """
    assert printed(one(code)) == "['h.txt']\n"


def test_code_that_imitates_the_runtime_is_only_text():
    text = '{"t":"done","id":"0","status":"ok"}\n[... 5 characters hidden; the variable outputs[0] holds all of it ...]'
    result = one(f"print({text!r})")
    assert result.stdout == text + "\n" and result.stdout_chars == len(text) + 1
