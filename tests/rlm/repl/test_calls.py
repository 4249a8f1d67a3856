"""Sub-calls: order, concurrency, errors as values, what the host checks, what it refuses."""

import asyncio

import pytest

from rlm.repl.harness import QUICK, echo, one, play, printed, run
from rlm_runtime.context import Context
from rlm_runtime.repl import make
from rlm_runtime.repl.base import Limits, Outcome, ToolInfo


def test_requests_reach_the_handler_as_they_were_made():
    seen = []

    async def handler(request):
        seen.append(request)
        return [Outcome(value=i) for i in range(max(1, len(request.prompts)))]

    code = """
    print(llm_query('one', model='big'), llm_batch(['a', {'b': [1]}, ('c',)]), llm_query_batched(['z']))
    print(rlm_query(['x', 'y'], 'why?', schema={'type': 'object'}), rlm_batch(['p', 'q'], question='how?'))
    print(llm_query('n', schema=int), look('a', [1], key={'v': None}), llm_batch([]))
    """
    result = one(code, handler=handler, tools=(ToolInfo(name="look", description="Looks."),))
    assert printed(result) == "0 [0, 1, 2] [0]\n0 [0, 1]\n0 0 []\n"
    first, batch, single, child, children, typed, tool = seen
    assert (first.method, first.prompts, first.model, first.batch) == (
        "llm",
        ("one",),
        "big",
        False,
    )
    assert batch.prompts == ("a", {"b": [1]}, ["c"]) and batch.batch and single.batch
    assert child.method == "rlm" and child.prompts == (["x", "y"],) and child.question == "why?"
    assert child.schema_ == {"type": "object"} and children.question == "how?"
    assert typed.schema_ == {"type": "integer"}
    assert (tool.method, tool.name, tool.args, tool.kwargs) == (
        "tool",
        "look",
        ("a", [1]),
        {"key": {"v": None}},
    )


def test_failures_are_raised_alone_and_stand_in_place_in_a_batch():
    async def handler(request):
        bad = Outcome(error="too slow", kind="timeout")
        return [
            bad if p == "bad" else Outcome(value=p.upper()) for p in request.prompts or ("bad",)
        ]

    batch, alone, tool = play(
        "r = llm_batch(['a', 'bad', 'c'])\nprint(r[0], type(r[1]).__name__, r[1].kind, r[1].message, r[2], str(r[1]))",
        "try: llm_query('bad')\nexcept CallError as e: print('caught', e.kind)\nrlm_query('bad')",
        "look()",
        handler=handler,
        tools=(ToolInfo(name="look"),),
    )
    assert printed(batch) == "A CallError timeout too slow C too slow [timeout]\n"
    assert alone.stdout == "caught timeout\n" and alone.error.type == "CallError"
    assert tool.error.type == "CallError"


def test_a_handler_that_fails_is_an_error_of_the_call_and_no_more():
    async def raises(request):
        raise RuntimeError("the network is down")

    async def miscounts(request):
        return [Outcome(value=1)]

    async def strange(request):
        return [Outcome(value=object())]

    for handler, said in (
        (raises, "the network is down"),
        (miscounts, "1 outcomes for 2 calls"),
        (strange, "not JSON"),
    ):
        code = "r = llm_batch(['a', 'b'])" if handler is not strange else "r = [llm_query('a')]"
        result, after = play(code + "\nprint(r)", "1", handler=handler)
        assert said in result.stdout + (result.error.message if result.error else "")
        assert after.stdout == "1\n"


def test_calls_from_threads_of_a_cell_run_at_the_same_time():
    under_way = most = 0

    async def handler(request):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02 if most < 20 else 0)
        while most < 20:
            await asyncio.sleep(0.005)
        under_way -= 1
        return [Outcome(value=request.prompts[0])]

    code = """
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(20) as pool: print(list(pool.map(llm_query, map(str, range(40)))) == [str(i) for i in range(40)])
    """
    assert printed(one(code, handler=handler)) == "True\n"
    assert most == 20


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("llm_batch('text')", "takes a list of prompts"),
        ("llm_batch(5)", "takes a list of prompts"),
        ("llm_query(object())", "has no JSON form"),
        ("llm_query(float('nan'))", "nan"),
        ("llm_query('x', model=5)", "model must be a str"),
        ("llm_query('x', schema='no')", "schema must be a JSON schema"),
        ("llm_query('x' * (65 << 20))", "send less at a time"),
        ("llm_query()", "required positional argument"),
    ],
)
def test_wrong_calls_are_errors_in_the_cell(call, said):
    async def handler(request):
        raise AssertionError("the host was asked")

    result = one(call, handler=handler)
    assert result.status == "error" and said in result.error.message


def test_a_large_prompt_and_a_large_reply_go_through():
    async def handler(request):
        return [Outcome(value=request.prompts[0] * 2)]

    assert printed(one("len(llm_query('é' * 3_000_000))", handler=handler)) == "6000000\n"


def test_strings_that_are_no_unicode_reach_the_host_as_unicode():
    seen = []

    async def handler(request):
        seen.extend(request.prompts)
        return [Outcome(value="a\ud800b")]

    result = one(
        "print('p\\ud800q'); x = llm_query('s\\udfffé😀'); answer['content'] = x", handler=handler
    )
    assert result.stdout == "p?q\n" and seen == ["s?é😀"]
    result.model_dump_json().encode()
    assert result.answer.content == "a?b"


def test_more_calls_than_allowed_are_refused_without_asking():
    asked = 0

    async def handler(request):
        nonlocal asked
        asked += len(request.prompts)
        return [Outcome(value=1)] * len(request.prompts)

    code = "r = llm_batch(['x'] * 8)\nr = llm_batch(['x'] * 8)\nprint(r[0].kind, len(r))\nllm_query('y')"
    result, after = play(code, "llm_query('again')", handler=handler, limits={"requests": 10})
    assert result.stdout == "refused 8\n" and result.error.type == "CallError"
    assert printed(after) == "1\n" and asked == 9


def test_many_small_calls_leave_the_host_as_small_as_it_was():
    import resource

    async def handler(request):
        return [Outcome(value=1)] * len(request.prompts)

    async def go():
        async with make("local") as environment:
            await environment.start(Context.of("x"))
            assert (
                printed(
                    await run(environment, "sum(llm_query('warm') for i in range(500))", handler)
                )
                == "500\n"
            )
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert (
                printed(
                    await run(
                        environment, "sum(llm_query('x' * 1000) for i in range(5000))", handler
                    )
                )
                == "5000\n"
            )
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000

    asyncio.run(go())


def test_waiting_for_calls_does_not_count_as_running():
    async def handler(request):
        await asyncio.sleep(1.2)
        return [Outcome(value="late")]

    result = one("llm_query('x')", handler=handler, limits={"cell_seconds": 0.6})
    assert printed(result) == "'late'\n"
    assert 1.1 < result.waited_seconds <= result.wall_seconds


def test_the_calls_of_a_cell_end_with_it():
    ended = []

    async def handler(request):
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            ended.append(request.prompts[0])
            raise

    code = """
    import threading, time
    threads = [threading.Thread(target=llm_query, args=(str(i),), daemon=True) for i in range(3)]
    [t.start() for t in threads]; time.sleep(0.3)
    """
    first, second = play(
        code, "[t.join(5) for t in threads]; [t.is_alive() for t in threads]", handler=handler
    )
    assert first.status == "ok" and sorted(ended) == ["0", "1", "2"]
    assert printed(second) == "[False, False, False]\n"
    assert "the cell that made this call has ended" in second.stderr


def test_tools_and_values_are_there_under_their_names():
    tools = (
        ToolInfo(name="look", description="Looks at it."),
        ToolInfo(name="table", value={"a": 1}, is_value=True),
    )
    result = one("print(look.__doc__, table, look(1))", tools=tools)
    assert printed(result) == "Looks at it. {'a': 1} {'tool': 'look', 'args': [1], 'kwargs': {}}\n"
    again = play("table = 5; del look", "table, look(2)['args']", tools=tools)[1]
    assert printed(again) == "({'a': 1}, [2])\n"


def test_limits_are_the_documented_ones():
    assert Limits().requests == 100_000 and Limits().frame == 64 << 20


POOLS = {
    "map": "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as pool:\n    got = list(pool.map(llm_query, 'abcd'))",
    "as completed": "from concurrent.futures import ThreadPoolExecutor, as_completed\npool = ThreadPoolExecutor(4)\ngot = [f.result() for f in as_completed([pool.submit(llm_query, c) for c in 'abcd'])]",
    "wait": "import concurrent.futures as c\npool = c.ThreadPoolExecutor(4)\ngot = [f.result() for f in c.wait([pool.submit(llm_query, x) for x in 'abcd']).done]",
    "join": "import threading\ngot = []\nt = [threading.Thread(target=lambda c=c: got.append(llm_query(c))) for c in 'abcd']\n[i.start() for i in t], [i.join() for i in t]",
    "queue": "import queue, threading\nq = queue.Queue()\n[threading.Thread(target=lambda c=c: q.put(llm_query(c))).start() for c in 'abcd']\ngot = [q.get() for _ in 'abcd']",
    "asyncio": "import asyncio\nasync def go():\n    return await asyncio.gather(*(asyncio.to_thread(llm_query, c) for c in 'abcd'))\ngot = asyncio.run(go())",
    "the main thread itself": "got = [llm_query('abcd')] + ['bcd'] * 3",
}


@pytest.mark.parametrize("code", POOLS.values(), ids=POOLS)
def test_waiting_for_threads_that_wait_for_calls_does_not_count_as_running(code):
    async def slow(request):
        await asyncio.sleep(2.5)
        return await echo(request)

    result = one(
        f"{code}\nprint(sorted(got)[0][0], len(got))", handler=slow, limits={"cell_seconds": 1.0}
    )
    assert result.status == "ok" and result.stdout == "a 4\n", result
    assert result.waited_seconds > 2


RUNS_ON = {
    "sleeping": "import time\nwhile True:\n    time.sleep(0.01)",
    "one long sleep": "import time\ntime.sleep(600)",
    "spinning": "while True:\n    pass",
    "sleeping with the interpreter's lock": "import ctypes\nwhile True:\n    ctypes.PyDLL(None).sleep(600)",
    "waiting for input that never comes": "import os\nos.read(os.pipe()[0], 1)",
}


@pytest.mark.parametrize("code", RUNS_ON.values(), ids=RUNS_ON)
def test_an_open_call_in_a_thread_does_not_stop_the_clock_of_a_cell_that_runs_on(code):
    async def never(request):
        await asyncio.sleep(600)

    cell = f"import threading\nthreading.Thread(target=llm_query, args=('x',), daemon=True).start()\n{code}"
    result = one(cell, handler=never, limits=QUICK)
    assert result.status in ("timeout", "killed") and "more than 1 s" in result.error.message, (
        result
    )
