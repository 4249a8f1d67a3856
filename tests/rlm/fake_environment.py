"""A REPL in this process, for tests of the loop: no sandbox and no second process, so a test takes
milliseconds.

It keeps what the contract of `Environment` promises to the loop: serial cells, outcomes as values
or CallError, bound values, `answer`, and an interrupted cell that ends. Cells run in a thread,
sub-calls go to the handler's loop.
"""

import asyncio
import contextlib
import ctypes
import io
import threading
import traceback
from typing import ClassVar

from rlm_runtime.repl.base import Answer, CellError, CellResult, Limits, Request, SandboxReport


class CallError(Exception):
    def __init__(self, message, kind):
        super().__init__(message)
        self.kind = kind


class Stop(BaseException):
    pass


class FakeEnvironment:
    live: ClassVar[set] = set()

    def __init__(self, limits=None):
        self.limits = limits or Limits()
        self.report = None
        self.names = {}
        self.bound = {}
        self.closed = False

    async def start(self, context, tools=()):
        self.live.add(self)
        self.report = SandboxReport(environment="fake", layers={})
        self.names = {"answer": {"content": None, "ready": False}, "CallError": CallError}
        self.tools = tools
        self.bound = {"context": self._value(context)}
        for tool in tools:
            if tool.is_value:
                self.names[tool.name] = tool.value
        return self.report

    def _value(self, context):
        return context.value if context.path is None else context.path.read_text()

    def _helpers(self, handler, loop):
        def ask(**request):
            try:
                future = asyncio.run_coroutine_threadsafe(handler(Request(**request)), loop)
            except RuntimeError:
                raise Stop from None
            self.waiting.append(future)
            outcomes = future.result()
            return [o.value if o.error is None else CallError(o.error, o.kind) for o in outcomes]

        def single(value):
            if isinstance(value, CallError):
                raise value
            return value

        def llm_query(prompt, *, model=None, schema=None):
            return single(ask(method="llm", prompts=(prompt,), model=model, schema_=schema)[0])

        def llm_batch(prompts, *, model=None, schema=None):
            return ask(
                method="llm", prompts=tuple(prompts), batch=True, model=model, schema_=schema
            )

        def rlm_query(prompt, question=None, *, schema=None):
            return single(
                ask(method="rlm", prompts=(prompt,), question=question, schema_=schema)[0]
            )

        def rlm_batch(prompts, question=None, *, schema=None):
            return ask(
                method="rlm", prompts=tuple(prompts), batch=True, question=question, schema_=schema
            )

        def final(value):
            self.names["answer"] = {"content": value, "ready": True}

        def tool(name):
            return lambda *args, **kwargs: single(
                ask(method="tool", name=name, args=args, kwargs=kwargs)[0]
            )

        own = {t.name: tool(t.name) for t in self.tools if not t.is_value}
        return {
            **own,
            "llm_query": llm_query,
            "llm_batch": llm_batch,
            "rlm_query": rlm_query,
            "rlm_batch": rlm_batch,
            "FINAL": final,
            "FINAL_VAR": lambda name: final(self.names[name]),
        }

    async def run(self, code, handler):
        loop = asyncio.get_running_loop()
        self.names.update(self._helpers(handler, loop), **self.bound)
        self.waiting = []
        done = loop.create_future()
        out = io.StringIO()

        def work():
            outcome = ("ok", None)
            try:
                exec(compile(code, "<cell>", "exec"), {**self.names, "print": printer}, self.names)
            except Stop:
                outcome = ("timeout", None)
            except BaseException as e:
                text = "".join(traceback.format_exception_only(e))
                outcome = (
                    "error",
                    CellError(type=type(e).__name__, message=str(e), traceback=text),
                )
            with contextlib.suppress(RuntimeError, Stop):
                loop.call_soon_threadsafe(lambda: done.done() or done.set_result(outcome))

        def printer(*args, **kwargs):
            print(*args, file=out, **kwargs)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            status, error = await done
        except asyncio.CancelledError:
            while thread.is_alive():
                # again and again: the cell may just be making another call
                for future in list(self.waiting):
                    future.cancel()
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread.ident), ctypes.py_object(Stop)
                )
                thread.join(0.002)
            raise
        answer = self.names.get("answer")
        answer = Answer(**answer) if isinstance(answer, dict) else Answer()
        return CellResult(status=status, stdout=out.getvalue(), error=error, answer=answer)

    async def bind(self, name, value):
        self.bound[name] = value

    async def rebind_context(self, context, name="context"):
        self.bound[name] = self._value(context)

    async def reset_answer(self):
        self.names["answer"] = {"content": None, "ready": False}

    async def aclose(self):
        self.closed = True
        self.live.discard(self)
