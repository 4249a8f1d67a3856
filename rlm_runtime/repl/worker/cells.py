"""The REPL itself: one namespace, cells run in it one by one, and what is to be said about each."""

from __future__ import annotations

import _ast
import sys
import types

from . import dialects, errors, interrupts, jsonable
from .calls import Calls, helpers, tool
from .capture import Capture, keeper
from .interrupts import guarded
from .state import Interpreter

ONLY_AST, TOP_LEVEL_AWAIT, COROUTINE = 0x400, 0x2000, 0x80
SOURCES, VARIABLES, NOTE_NAMES = 200, 200, 6
RESERVE = 1 << 20  # bytes, of what is said about a cell when there is no memory left
PROBE = "print([str(i) for i in range(9)])\n" * 8  # a cell that must be able to begin
KEPT_IN_ALL = 10  # times `kept_chars`: what `outputs` holds together


_print = print


class Listing(str):
    """Text that shows as it is when it is the last expression of a cell."""

    def __repr__(self) -> str:
        return str.__str__(self)


class Repl:
    def __init__(
        self, calls: Calls, limits: dict, tools: list[dict], hint=None, mirrors=(None, None)
    ):
        self._calls, self._limits, self._hint = calls, limits, hint
        shown, kept = limits["output_chars"], limits["kept_chars"]
        self._out = Capture("<stdout>", 1, kept, shown, mirrors[0])
        self._err = Capture("<stderr>", 2, shown, shown, mirrors[1])
        self._restore_streams = keeper((self._out, self._err))
        self._kept_in_all = KEPT_IN_ALL * kept
        self._outputs: list[str] = []
        self._sources: dict[str, list[str]] = {}
        self.module = types.ModuleType("__main__")
        self.names = vars(self.module)
        self._new_answer()
        self._tools = tools
        self._fixed: dict = {"outputs": []}
        self._new_helpers()
        self._fixed |= {info["name"]: info["value"] for info in tools if info["is_value"]}
        self._reserve: bytes | None = None
        self.interpreter = Interpreter(self._out, self._err)
        self.interpreter.main = self.module

    def bind(self, name: str, value) -> None:
        """A name that is put back before every cell: `context`, `history`, ..."""
        self._fixed[name] = value
        self.names[name] = value

    def _new_helpers(self) -> None:
        """Function objects nobody has changed the code or the closure of."""
        self._fixed |= helpers(self._calls)
        for info in self._tools:
            if not info["is_value"]:
                self._fixed[info["name"]] = tool(self._calls, info["name"], info["description"])
        self._fixed |= {
            "FINAL": self.final,
            "FINAL_VAR": self.final_var,
            "SHOW_VARS": self.show_vars,
        }
        self._fixed["print"] = _print  # a variable of that name would take the next cell's voice

    def _new_answer(self) -> None:
        self.answer = {"content": None, "ready": False}
        self.names["answer"] = self.answer

    # -- a cell

    def prepare(self, message: dict) -> None:
        """All that happens before the cell's own code: nothing of an earlier cell runs in here.

        Raises MemoryError where earlier cells have left too little for even a small cell.
        """
        self.interpreter.restore()
        self._restore_streams()
        for i, raw in message["raw"].items():  # what went past sys.stdout, as the host read it
            if int(i) < len(self._outputs):
                self._outputs[int(i)] += raw
        while len(self._outputs) < message["n"]:
            self._outputs.append("(lost: the worker was restarted after this cell)")
        self._new_helpers()
        self._fixed["outputs"] = list(self._outputs)
        for name, value in message["binds"].items():
            self.bind(name, value)
        if message["reset_answer"] or type(self.names.get("answer")) is not dict:
            self._new_answer()
        self.answer = self.names["answer"]
        self.names.update(self._fixed)
        self.names.update(__name__="__main__", __builtins__=self.interpreter._modules["builtins"])
        self._reserve = bytes(RESERVE)  # to be given back when there is no memory left
        compile(PROBE, "<probe>", "exec")
        self._calls.begin(message["id"])

    def run(self, message: dict) -> dict:
        """Run a cell; the whole of what the host is told."""
        settrace, setprofile, setrecursionlimit, recursion = self.interpreter.settle_calls
        problem = None
        try:
            guarded(self._execute, message["code"], f"<cell {message['n']}>")
        except BaseException as raised:
            problem = raised
        settrace(None)
        setprofile(None)
        setrecursionlimit(recursion)
        for _ in range(5):
            try:
                interrupts.disarm()
                break
            except BaseException:  # raised by a handler of the cell's
                continue
        self._reserve = None
        status, error = ("ok", None) if problem is None else self._failed(problem)
        problem = None
        answer, refused = self._read_answer()
        self._calls.end()
        if refused is not None and error is None:
            status, error = "error", refused
        try:
            variables = guarded(self._variables)
        except BaseException:
            variables = {}
        return {
            "t": "done",
            "id": message["id"],
            "status": status,
            "error": error,
            "answer": answer,
            "variables": variables,
            **self._output(message["n"]),
        }

    def failed(self, message: dict, problem: BaseException) -> dict:
        """The least that can be said of a cell."""
        self._restore_streams()
        self._calls.end()
        error = {
            "type": errors.name_of(problem),
            "message": errors.message_of(problem),
            "traceback": "",
        }
        errors.clear(problem)
        return {
            "t": "done",
            "id": message["id"],
            "status": "error",
            "error": error,
            "variables": {},
            "answer": {"content": None, "ready": False},
            "stdout": "",
            "stdout_chars": 0,
            "stderr": "",
            "stderr_chars": 0,
        }

    def _execute(self, code: str, file: str) -> None:
        self._remember(file, code)
        tree = compile(code, file, "exec", ONLY_AST | TOP_LEVEL_AWAIT, True)
        dialects.put_right(tree, code, self._fixed)
        last = None
        if tree.body and isinstance(tree.body[-1], _ast.Expr):
            last = _ast.Expression(body=tree.body.pop().value)
        if tree.body:
            self._evaluate(compile(tree, file, "exec", TOP_LEVEL_AWAIT, True))
        if last is not None:
            value = self._evaluate(compile(last, file, "eval", TOP_LEVEL_AWAIT, True))
            if value is not None:
                self._out.write(repr(value) + "\n")

    def _evaluate(self, code):
        value = eval(code, self.names)
        if code.co_flags & COROUTINE:
            import asyncio

            return asyncio.run(value)
        return value

    def _remember(self, file: str, code: str) -> None:
        self._sources[file] = lines = code.split("\n")
        if len(self._sources) > SOURCES:
            del self._sources[next(iter(self._sources))]
        linecache = sys.modules.get("linecache")
        if linecache is not None and isinstance(getattr(linecache, "cache", None), dict):
            linecache.cache[file] = (len(code), None, [line + "\n" for line in lines], file)

    def _failed(self, problem: BaseException) -> tuple[str, dict]:
        status = "timeout" if isinstance(problem, interrupts.CellTimeout) else "error"
        for attempt in (True, False):
            try:
                error = guarded(self._describe, problem, attempt)
                break
            except BaseException:  # its class fights back, or there is no memory even for this
                continue
        else:
            error = {
                "type": "Error",
                "message": "<the exception could not be described>",
                "traceback": "",
            }
        errors.clear(problem)
        return status, error

    def _describe(self, problem: BaseException, whole: bool) -> dict:
        kind = errors.name_of(problem)
        if not whole:
            return {"type": kind, "message": "", "traceback": ""}
        message = errors.message_of(problem)
        if isinstance(problem, SystemExit):
            message = f"the cell called sys.exit({message}); the REPL keeps running."
        elif isinstance(problem, MemoryError) and not message:
            message = f"the cell needed more than its {self._limits['memory'] >> 20} MiB of memory."
        extra = self._hint(problem) if self._hint is not None else None
        trace = errors.traceback_of(problem, self._sources)
        if extra:  # in both: the model is shown the traceback, other readers the message
            message, trace = f"{message}\n{extra}", f"{trace.rstrip()}\n{extra}\n"
        return {"type": kind, "message": message, "traceback": trace}

    # -- what is said about it

    def _read_answer(self) -> tuple[dict, dict | None]:
        """`answer` as JSON, and the error where it is marked ready but cannot be one."""
        try:
            return guarded(self._answer)
        except BaseException as problem:
            error = {
                "type": errors.name_of(problem),
                "message": errors.message_of(problem),
                "traceback": "",
            }
            errors.clear(problem)
            # it would fail, or take its time, after every cell
            if not isinstance(problem, (TypeError, ValueError)):
                error["message"] += " [raised while `answer` was read: `answer` is empty again]"
                self._new_answer()
            return {"content": None, "ready": False}, error

    def _answer(self) -> tuple[dict, dict | None]:
        value = self.names.get("answer")
        if not isinstance(value, dict):
            self.answer["content"] = value
            self.names["answer"] = value = self.answer
            self._err.write(
                "note: `answer` is a dict; to finish set answer['content'] and answer['ready'] = True.\n"
            )
        elif type(value) is not dict:
            value = self.names["answer"] = dict(value)
        self.answer = value
        ready = bool(value.get("ready"))
        try:
            content = jsonable.plain(value.get("content"), "answer['content']")
            size = len(jsonable.dumps(content))
            if size > self._limits["frame"] // 2:
                raise ValueError(
                    f"answer['content'] is {size:,} bytes as JSON; {self._limits['frame'] // 2:,} fit."
                )
        except Exception:
            if not ready:
                return {"content": None, "ready": False}, None
            value["ready"] = False
            raise
        return {"content": content, "ready": ready}, None

    def _output(self, n: int) -> dict:
        shown = self._limits["output_chars"]
        changed = sorted(
            name for name, value in self._fixed.items() if self.names.get(name) is not value
        )
        if changed:
            names = ", ".join(changed[:NOTE_NAMES]) + (", ..." if len(changed) > NOTE_NAMES else "")
            self._err.write(
                f"note: {names}: the runtime's own, put back before the next cell; use another name.\n"
            )
        self._outputs.append(self._out.kept())
        total = 0
        for i in range(len(self._outputs) - 1, -1, -1):
            total += len(self._outputs[i])
            if total > self._kept_in_all:
                self._outputs[i] = "(dropped: later outputs took its room)"
        return {
            "stdout": self._out.shown(shown, f"outputs[{n}]"),
            "stdout_chars": self._out.chars,
            "stderr": self._err.shown(shown, None),
            "stderr_chars": self._err.chars,
        }

    def _variables(self) -> dict[str, str]:
        found = {}
        for name in list(self.names):
            if (
                type(name) is str
                and not name.startswith("_")
                and name not in self._fixed
                and name != "answer"
            ):
                value = self.names.get(name)
                if type(value) is types.ModuleType:
                    continue
                if len(found) >= VARIABLES:
                    found["..."] = "more variables; SHOW_VARS() lists all"
                    break
                found[errors.cut(name, 100)] = describe(value)
        return found

    # -- helpers that belong to the REPL

    def final(self, value=None) -> None:
        """Give the final answer: any JSON value."""
        self.answer = (
            self.names["answer"] if type(self.names.get("answer")) is dict else self.answer
        )
        self.answer["content"], self.answer["ready"] = value, True
        self.names["answer"] = self.answer

    def final_var(self, name) -> None:
        """Give the value of a variable, by its name, as the final answer."""
        if isinstance(name, str):
            wanted = name.strip().strip("\"'")
            if wanted not in self.names:
                raise NameError(
                    f"FINAL_VAR: there is no variable {wanted!r}. SHOW_VARS() lists what there is."
                )
            name = self.names[wanted]
        self.final(name)

    def show_vars(self) -> str:
        """The variables there are, with type and size."""
        lines = [f"{n}: {d}" for n, d in self._variables().items()]
        lines += [
            f"{n}: {describe(self._fixed[n])}" for n in self._fixed if not callable(self._fixed[n])
        ]
        return Listing("\n".join(lines))


def describe(value) -> str:
    """Type and size in a few words, without running code of the value's class."""
    kind = type(value)
    name = errors.cut(type.__dict__["__name__"].__get__(kind), 100)
    if kind is str:
        return f"str, {len(value):,} characters"
    if kind in (list, tuple, dict, set, frozenset):
        return f"{name}, {len(value):,} items"
    if kind in (bytes, bytearray):
        return f"{name}, {len(value):,} bytes"
    if kind in (int, float, bool, type(None)):
        return name
    if issubclass(kind, type):  # not isinstance, which asks the value for its class
        return "class"
    if kind is types.FunctionType:
        return "function"
    numpy = sys.modules.get("numpy")
    if numpy is not None and kind is vars(numpy).get("ndarray"):
        return f"array of shape {value.shape}, {value.dtype}"
    return name
