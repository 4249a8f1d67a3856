"""Tools: JSON in, types checked, JSON out; what goes wrong is a typed error; impossible ones are
refused at the door."""

import asyncio
import datetime
import threading
from enum import Enum

import pytest
from pydantic import BaseModel

from rlm.loop_helpers import cell, done, rlm, types
from rlm_runtime import Tool
from rlm_runtime.errors import UsageError
from rlm_runtime.tools import RESERVED, ToolError, toolbox


class Colour(Enum):
    RED = "red"


class Point(BaseModel):
    x: int
    y: int = 0


def call(function, *args, **kwargs):
    return asyncio.run(toolbox([function])[function.__name__].call(args, kwargs))


def test_arguments_arrive_as_their_types():
    def when(day: datetime.date, colour: Colour, point: Point, sizes: set[int]) -> str:
        return f"{day.year} {colour.name} {point.x} {sorted(sizes)}"

    assert call(when, "2024-05-01", "red", {"x": 3}, [2, 1, 2]) == "2024 RED 3 [1, 2]"


def test_results_leave_as_json():
    def made() -> Point:
        return Point(x=1)

    assert call(made) == {"x": 1, "y": 0}


def test_async_tools_and_tools_that_return_awaitables():
    async def later(n: int):
        await asyncio.sleep(0)
        return n + 1

    assert call(later, 1) == 2
    box = toolbox({"wrapped": lambda n: later(n)})
    assert asyncio.run(box["wrapped"].call((1,))) == 2


def test_sync_tools_do_not_stop_the_loop():
    release = threading.Event()

    def blocks():
        return release.wait(10)

    async def main():
        task = asyncio.create_task(toolbox([blocks])["blocks"].call())
        await asyncio.sleep(0.01)  # the loop goes on
        release.set()
        return await task

    assert asyncio.run(main()) is True


@pytest.mark.parametrize(
    "args, kwargs, words",
    [
        ((), {}, "missing"),
        (("x",), {}, "argument 'n'"),
        ((1, 2), {}, "too many"),
        ((), {"m": 1}, "m"),
        ((13,), {}, "unlucky"),
    ],
)
def test_errors_name_the_tool_and_what_is_wrong(args, kwargs, words):
    def count(n: int):
        if n == 13:
            raise ValueError("unlucky")

    with pytest.raises(ToolError, match=words) as e:
        call(count, *args, **kwargs)
    assert "count" in str(e.value)


def test_what_is_not_json_is_an_error():
    def odd():
        return object()

    with pytest.raises(ToolError, match="not JSON"):
        call(odd)


def test_leaving_the_process_is_an_error_of_the_tool():
    def leave():
        raise SystemExit(3)

    async def leave_later():
        raise SystemExit(3)

    for function in (leave, leave_later):
        with pytest.raises(ToolError, match="SystemExit"):
            call(function)


def test_native_calls_by_name():
    def f(a: int, /, b: int, *rest: int, c: int = 0, **more: int):
        return [a, b, list(rest), c, more]

    tool = toolbox([f])["f"]
    assert asyncio.run(tool.call_named({"a": 1, "b": 2, "c": 3, "d": 4})) == [1, 2, [], 3, {"d": 4}]
    with pytest.raises(ToolError, match="JSON object"):
        asyncio.run(tool.call_named("{broken"))
    schema = tool.spec().parameters
    assert schema["required"] == ["a", "b"] and schema["properties"]["a"]["type"] == "integer"


def test_schemas_hoist_their_definitions():
    def draw(points: list[Point], colour: Colour = Colour.RED) -> None:
        """Draw."""

    schema = toolbox([draw])["draw"].spec().parameters
    assert schema["$defs"]["Point"]["properties"]["x"]["type"] == "integer"
    assert schema["properties"]["points"]["items"] == {"$ref": "#/$defs/Point"}


@pytest.mark.parametrize(
    "name", [*sorted(RESERVED), "context_3", "print", "class", "a b", "__x", ""]
)
def test_reserved_and_impossible_names_are_refused(name):
    with pytest.raises(UsageError):
        toolbox({name: 1})


@pytest.mark.parametrize("tools", [len, "abc", [lambda: 1], [3], {"x": object()}, [Tool("x")]])
def test_what_is_no_tool_is_refused(tools):
    with pytest.raises(UsageError):
        toolbox(tools)


def test_two_tools_of_one_name_are_refused():
    def f(): ...

    with pytest.raises(UsageError, match="two tools"):
        toolbox([f, Tool("f", f)])


def test_three_ways_in_a_run():
    def area(w: int, h: int) -> int:
        """Area of a field."""
        return w * h

    async def price(n: int) -> float:
        return n * 1.5

    code = "try:\n    area('wide', 2)\nexcept CallError as e:\n    kind, text = e.kind, str(e)\nout = price(n=area(FIELD['w'], 3))"
    model = rlm(
        [cell(code), done("[out, kind, text]")],
        tools={"area": area, "price": price, "FIELD": {"w": 4}},
    )
    result = model.completion("text")
    assert result.answer[:2] == [18.0, "tool"] and "argument 'w'" in result.answer[2]
    assert types(result).count("node_start") == 3
    assert "area(w: int, h: int) -> int" in model.options.root.messages[0][0].content


def test_a_tool_that_never_returns_does_not_hold_the_run():
    forever = threading.Event()
    try:
        model = rlm(
            [cell("wait()"), "too slow"], tools={"wait": forever.wait}, budget={"seconds": 0.2}
        )
        assert model.completion("text").answer == "too slow"
    finally:
        forever.set()
