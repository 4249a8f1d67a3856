"""The runtime's names, its modules and the interpreter under them: overwritten, poisoned, replaced,
and still right."""

from __future__ import annotations

import pytest

from rlm.attacks.arena import Arena, attack, names

OVERWRITTEN = {
    "helpers overwritten": "llm_query = llm_batch = rlm_query = FINAL = FINAL_VAR = SHOW_VARS = print = context = outputs = CallError = 5",
    "helpers deleted": "del llm_query, answer, context, outputs, FINAL",
    "everything deleted": "for n in list(globals()):\n    del globals()[n]",
    "answer overwritten": "answer = lambda: 1",
    "answer deleted": "del answer",
    "answer full of rubbish": "answer.clear()\nanswer[1] = 2",
    "built-ins of the cell": "__builtins__ = {}",
    "built-ins emptied": "import builtins\nvars(builtins).clear()",
    "built-ins replaced": "import builtins\nfor n in list(vars(builtins)):\n    if not n.startswith('__'):\n        setattr(builtins, n, None)",
    "print replaced": "import builtins\nbuiltins.print = lambda *a, **k: None",
    "import replaced": "import builtins\nbuiltins.__import__ = None",
    "class building replaced": "import builtins\nbuiltins.__build_class__ = None\nbuiltins.open = builtins.compile = builtins.eval = builtins.exec = builtins.isinstance = builtins.len = builtins.type = None",
    "modules forgotten": "sys.modules.clear()",
    "modules poisoned": "for n in list(sys.modules):\n    sys.modules[n] = None",
    "modules replaced": "import types\nfor n in ('json', 're', 'os', 'sys', 'threading', 'asyncio', 'io', 'builtins', 'linecache', 'traceback', 'signal', '_thread', 'gc', 'worker'):\n    sys.modules[n] = types.ModuleType(n)",
    "functions of modules replaced": "import json, re, os, threading, signal, io, gc, linecache, traceback, types, struct, socket, _socket, _json, _signal, _thread\nfor m in (json, re, os, threading, signal, io, linecache, traceback, types, struct, socket, _json, _socket, _signal, _thread, gc):\n    for n in list(vars(m)):\n        if callable(getattr(m, n)) and not n.startswith('__'):\n            try:\n                setattr(m, n, lambda *a, **k: 1 / 0)\n            except Exception:\n                pass",
    "sys emptied": "for n in list(vars(sys)):\n    if n not in ('modules',):\n        try:\n            delattr(sys, n)\n        except Exception:\n            pass",
    "streams replaced": "sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None",
    "streams deleted": "del sys.stdout, sys.stderr",
    "an evil stream": "class S:\n    def write(self, t):\n        raise SystemExit(t)\n    def flush(self):\n        raise SystemExit\nsys.stdout = sys.stderr = S()",
    "the stream's methods": "sys.stdout.write = None\nsys.stdout.kept = sys.stdout.shown = sys.stdout.clear = None",
    "the stream's class": "t = type(sys.stdout)\nfor n in ('write', 'flush'):\n    setattr(t, n, lambda *a: 1 / 0)",
    "tracing": "def t(*a):\n    raise ValueError('traced')\nsys.settrace(t)",
    "tracing of threads": "import threading\nthreading.settrace(lambda *a: 1 / 0)\nthreading.setprofile(lambda *a: 1 / 0)",
    "profiling": "sys.setprofile(lambda *a: 1 / 0)",
    "audit hook": "def h(*a):\n    raise SystemExit('audited')\ntry:\n    sys.addaudithook(h)\nexcept PermissionError:\n    pass",
    "audit hook by C": "H = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p)\nhook = H(lambda *a: -1)\nctypes.pythonapi.PySys_AddAuditHook(hook, None)",
    "hooks of sys": "sys.excepthook = sys.displayhook = sys.unraisablehook = lambda *a: 1 / 0",
    "finders": "class F:\n    def find_spec(self, *a):\n        raise SystemExit('found')\nsys.meta_path.insert(0, F())\nsys.path_hooks.insert(0, lambda p: 1 / 0)\nsys.path_importer_cache.clear()",
    "no finders": "sys.meta_path.clear()\nsys.path_hooks.clear()\nsys.path.clear()",
    "no path at all": "sys.path = sys.meta_path = sys.path_hooks = None",
    "files in the work folder": "for n in ('json', 're', 'os', 'sitecustomize', 'usercustomize', 'threading', 'asyncio', 'traceback', 'linecache', 'statistics', 'random', 'worker', 'encodings'):\n    open(n + '.py', 'w').write('raise SystemExit(\"shadowed\")')\nsys.path.insert(0, os.getcwd())",
    "recursion": "sys.setrecursionlimit(30)",
    "recursion as low as can be": "try:\n    for i in range(200, 1, -1):\n        sys.setrecursionlimit(i)\nexcept RecursionError:\n    pass",
    "digits": "sys.set_int_max_str_digits(640)",
    "switch interval": "sys.setswitchinterval(10**5)",
    "garbage": "import gc\ngc.set_threshold(1, 1, 1)\ngc.set_debug(gc.DEBUG_SAVEALL)\ngc.callbacks.append(lambda *a: 1 / 0)",
    "warnings are errors": "import warnings\nwarnings.simplefilter('error')",
    "locale": "import locale\nlocale.setlocale(locale.LC_ALL, 'C')",
    "environment": "os.environ.clear()\nos.environ['PYTHONPATH'] = '/'",
    "name": "__name__ = 5\n__doc__ = lambda: 1\n__loader__ = __spec__ = 3",
    "frames": "f = sys._getframe()\nwhile f:\n    for n in list(f.f_locals):\n        f.f_locals[n] = None\n    ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(f), ctypes.c_int(0))\n    f = f.f_back",
    "globals of the runtime": "f = sys._getframe(1)\nwhile f:\n    if f.f_globals is not globals():\n        f.f_globals.clear()\n    f = f.f_back",
    "modules of the runtime": "import gc, types\nfor o in gc.get_objects():\n    if isinstance(o, types.ModuleType) and o.__name__.startswith('worker'):\n        for n in list(vars(o)):\n            if not n.startswith('__'):\n                setattr(o, n, None)",
    "classes of the runtime": "import gc\nfor o in gc.get_objects():\n    if type(o) is type and str(o.__module__).startswith('worker'):\n        for n in list(vars(o)):\n            if callable(vars(o)[n]):\n                try:\n                    setattr(o, n, lambda *a, **k: 1 / 0)\n                except Exception:\n                    pass",
    "state of the runtime": "import gc\nfor o in gc.get_objects():\n    if type(o).__name__ in ('Calls', 'Repl', 'Channel', 'Service', 'Capture', 'Interpreter'):\n        vars(o).clear()",
    "code of the helpers": "for f in (llm_query, FINAL, SHOW_VARS):\n    f = getattr(f, '__func__', f)\n    f.__code__ = (lambda *a, **k: 'FAKE').__code__ if not f.__code__.co_freevars else f.__code__\n    f.__defaults__ = ()\n    f.__kwdefaults__ = None",
    "closures of the helpers": "for c in llm_query.__closure__:\n    c.cell_contents = None",
    "globals of the helpers": "llm_query.__globals__.clear()",
    "class of the errors": "CallError.__init__ = None\nCallError.__str__ = None",
    "every dict": "import gc\nfor o in gc.get_objects():\n    if type(o) is dict and o is not globals():\n        o.clear()",
    "every list": "import gc\nfor o in gc.get_objects():\n    if type(o) is list:\n        o.clear()",
    "every function": "import gc, types\nfor o in gc.get_objects():\n    if type(o) is types.FunctionType:\n        o.__code__ = (lambda *a, **k: None).__code__ if not o.__code__.co_freevars else o.__code__",
    "types by C": "d = ctypes.py_object.from_address(id(str.__dict__) + 16).value\nd['upper'] = lambda s: 'FAKE'\nd['__len__'] = 5\nctypes.pythonapi.PyType_Modified(ctypes.py_object(str))",
    "small integers by C": "ctypes.memset(id(6) + 24, 9, 1)",
    "singletons by C": "ctypes.memset(id(True) + 24, 0, 1)",
}
OVERWRITTEN = [attack(name, cell) for name, cell in OVERWRITTEN.items()]
# They corrupt the interpreter's own values: any later cell of that process computes with them. Only
# the host is safe.
ONLY_CONTAINED = {"small integers by C", "singletons by C"}


@pytest.mark.parametrize("what", OVERWRITTEN, ids=names(OVERWRITTEN))
def test_the_next_cell_is_right(what):
    with Arena(cell_seconds=4.0, grace_seconds=0.4) as arena:
        if what.name in ONLY_CONTAINED:
            result = arena.run(what.cells[0])
            arena.bounded(result)
            arena.run("print(6 * 7)")
            arena.run("import os\nos._exit(0)")
            arena.alive()
            arena.host.unharmed()
            return
        arena.play(what)
        last = arena.run(
            "import json, re\nprint(json.dumps([1]), re.sub('a', 'b', 'cat'), len(context), sorted([2, 1]))\nFINAL('done')"
        )
        # of the standard library: the cells' own business
        if what.name not in ("functions of modules replaced",):
            assert last.status == "ok" and "[1] cbt 9 [1, 2]" in last.stdout, last
            assert last.answer.ready and last.answer.content == "done", last


ANSWERS = {
    "repr": "class A:\n    def __repr__(self):\n        raise SystemExit\nanswer['content'] = A()",
    "length": "class A(list):\n    def __len__(self):\n        return 10**18\nanswer['content'] = A([1])",
    "iteration": "class A(list):\n    def __iter__(self):\n        while True:\n            yield 1\nanswer['content'] = A()",
    "class": "class A:\n    __class__ = property(lambda s: dict)\n    def items(self):\n        return [('x' * 100, self)]\nanswer['content'] = A()",
    "text": "class S(str):\n    def __str__(self):\n        raise KeyboardInterrupt\n    __repr__ = __len__ = encode = isascii = __getitem__ = __str__\nanswer['content'] = S('plain')",
    "number": "class N(int):\n    def __int__(self):\n        return self\n    __index__ = __int__\nanswer['content'] = N(5)",
    "float": "class N(float):\n    def __float__(self):\n        raise SystemExit\nanswer['content'] = N(5)",
    "dict": "class D(dict):\n    def items(self):\n        raise KeyboardInterrupt\n    get = __getitem__ = __iter__ = keys = items\nanswer['content'] = D(a=1)",
    "the answer itself": "class D(dict):\n    def get(self, *a):\n        raise SystemExit\n    __getitem__ = keys = __iter__ = items = get\nanswer = D(content=1, ready=True)",
    "itself": "a = []\na.append(a)\nanswer['content'] = a",
    "deep": "a = []\nfor _ in range(10**5):\n    a = [a]\nanswer['content'] = a",
    "wide": "answer['content'] = list(range(5_000_000))",
    "long": "answer['content'] = 'x' * 100_000_000",
    "integer": "answer['content'] = 10 ** 100_000",
    "no numbers": "answer['content'] = [float('nan'), float('inf')]",
    "keys": "class K:\n    def __hash__(self):\n        return 1\n    def __eq__(self, o):\n        raise SystemExit\nanswer['content'] = {K(): 1, (1, 2): 3}",
    "surrogates": "answer['content'] = '\\ud800' * 1000",
    "ready": "class T:\n    def __bool__(self):\n        raise SystemExit\nanswer['ready'] = T()",
    "generator": "answer['content'] = (i for i in iter(int, 1))",
    "metaclass": "class M(type):\n    def __getattribute__(c, n):\n        raise SystemExit(n)\n    def __instancecheck__(c, o):\n        raise SystemExit\nclass A(metaclass=M):\n    pass\nanswer['content'] = A()",
    "data class": "class A:\n    __dataclass_fields__ = {'x' * 10: 1}\n    def __getattr__(self, n):\n        return self\nanswer['content'] = A()",
    "a set that cannot be sorted": "class K:\n    def __lt__(self, o):\n        raise SystemExit\nanswer['content'] = {K(), K()}",
    "it calls the host": "class L(list):\n    def __iter__(self):\n        llm_query('from the answer')\n        return iter([])\nanswer['content'] = L([1])",
    "a module's name": "class A:\n    pass\nA.__module__ = 'numpy'\nA.tolist = lambda s: s\nanswer['content'] = A()",
}
ANSWERS = [attack(name, "answer['ready'] = True\n" + cell) for name, cell in ANSWERS.items()]


@pytest.mark.parametrize("what", ANSWERS, ids=names(ANSWERS))
def test_answers(what):
    with Arena(cell_seconds=3.0, grace_seconds=0.4, memory=512 << 20) as arena:
        (result,) = arena.play(what)
        if result.answer.ready:
            import json

            json.dumps(result.answer.content, allow_nan=False).encode()
        else:
            assert result.error is not None, "an answer that is not taken must be explained"
        again = arena.run("FINAL('simple')")
        assert again.answer.content == "simple" and again.answer.ready, again


VARIABLES = {
    "repr": "class V:\n    def __repr__(self):\n        print('BREACH')\n        raise SystemExit\nv = V()",
    "length": "class V(list):\n    def __len__(self):\n        print('BREACH')\n        return -1\nv = V()",
    "class": "class V:\n    @property\n    def __class__(self):\n        print('BREACH')\n        raise SystemExit\nv = V()",
    "metaclass": "class M(type):\n    def __getattribute__(c, n):\n        if n != '__mro_entries__':\n            print('BREACH')\n        raise SystemExit\nclass V(metaclass=M):\n    pass\nv = V()",
    "name": "class V:\n    pass\nV.__name__ = 'x' * 10**6\nv = V()",
    "module": "class E(str):\n    def __eq__(self, o):\n        print('BREACH')\n        raise SystemExit\n    __hash__ = str.__hash__\nclass V:\n    pass\nV.__module__ = E('numpy')\nv = V()",
    "array": "class ndarray:\n    @property\n    def shape(self):\n        print('BREACH')\n        raise SystemExit\nndarray.__module__ = 'numpy'\nv = ndarray()",
    "long name": "globals()['x' * 10**7] = 1\nv = 1",
    "name that is a str's child": "class S(str):\n    def startswith(self, *a):\n        print('BREACH')\n        raise SystemExit\nglobals()[S('s')] = 1\nv = 1",
    "many": "for i in range(10**5):\n    globals()['v%d' % i] = i\nv = 1",
}
VARIABLES = [attack(name, cell, ends="ok") for name, cell in VARIABLES.items()]


@pytest.mark.parametrize("what", VARIABLES, ids=names(VARIABLES))
def test_variables_are_listed_without_running_their_code(what):
    with Arena() as arena:
        (_result,) = arena.play(attack("named", "a_plain_one = 5\n"))
        arena.play(what)
        listed = arena.run("SHOW_VARS()")
        assert listed.status == "ok" and "BREACH" not in listed.stdout, listed
        assert (
            "a_plain_one" in listed.variables
            and "a_plain_one: int" in arena.run("print(SHOW_VARS())").stdout
        )


PROMPTS = {
    "text": "class S(str):\n    def __str__(self):\n        return 5\n    encode = isascii = __repr__ = __len__ = __str__\nprint(llm_query(S('plain')) == 'plain')",
    "lists": "class L(list):\n    def __iter__(self):\n        return iter(lambda: 1, 2)\nllm_batch(L())",
    "schema": "class D(dict):\n    def items(self):\n        return [(self, self)]\nllm_query('x', schema=D(a=1))",
    "model": "class S(str):\n    def __str__(self):\n        return {'not': 'text'}\nllm_query('x', model=S('m'))",
    "the number of prompts": "class L(list):\n    def __len__(self):\n        return 0\n    def __bool__(self):\n        return False\nprint(len(llm_batch(L(['a', 'b']))))",
    "a prompt that asks": "class L(list):\n    def __iter__(self):\n        llm_query('inner')\n        return iter(['outer'])\nprint(llm_query(L([1])))",
}
PROMPTS = [attack(name, cell) for name, cell in PROMPTS.items()]


@pytest.mark.parametrize("what", PROMPTS, ids=names(PROMPTS))
def test_prompts(what):
    with Arena(cell_seconds=2.0, grace_seconds=0.4, memory=256 << 20) as arena:
        arena.play(what)
        for request in arena.calls:
            assert all(
                type(p) in (str, list, dict, int, float, bool, type(None)) for p in request.prompts
            )
