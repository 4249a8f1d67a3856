"""The interpreter as a cell finds it: whatever the last one left patched, traced or replaced is put
back."""

from __future__ import annotations

import builtins
import gc
import sys
import types

from . import interrupts

SYS_NAMES = (
    "displayhook",
    "excepthook",
    "unraisablehook",
    "breakpointhook",
    "settrace",
    "setprofile",
    "exit",
    "getrecursionlimit",
    "setrecursionlimit",
    "_getframe",
    "modules",
    "getsizeof",
    "intern",
    "exc_info",
    "addaudithook",
    "flags",
    "maxsize",
    "version_info",
    "stdlib_module_names",
    "builtin_module_names",
)


class Interpreter:
    """Taken once, before the first cell."""

    def __init__(self, stdout, stderr):
        sys.addaudithook = _no_audit_hook  # one that raises could never be taken away again
        self._streams = {"stdout": stdout, "stderr": stderr, "stdin": sys.stdin}
        self._live_builtins, self._live_sys = vars(builtins), vars(sys)
        self._builtins = dict(vars(builtins))
        self._sys = {name: getattr(sys, name) for name in SYS_NAMES if hasattr(sys, name)}
        self._sys |= {"__" + name + "__": stream for name, stream in self._streams.items()}
        self._modules = {name: module for name, module in sys.modules.items() if not _own(name)}
        self._path, self._meta_path, self._path_hooks = (
            list(sys.path),
            list(sys.meta_path),
            list(sys.path_hooks),
        )
        self._limits = (
            sys.getrecursionlimit(),
            sys.getswitchinterval(),
            sys.get_int_max_str_digits(),
        )
        self.settle_calls = sys.settrace, sys.setprofile, sys.setrecursionlimit, self._limits[0]
        self._switch = sys.setswitchinterval
        self._gc = gc.callbacks, gc.enable, gc.set_threshold, gc.get_threshold(), gc.set_debug
        self._int_digits = sys.set_int_max_str_digits
        self._update, self._arm = dict.update, interrupts.arm
        self._mutable = (types.FunctionType, types.BuiltinFunctionType, type, types.ModuleType)
        self.main = None
        self._functions = [
            (f, f.__code__, f.__defaults__, f.__kwdefaults__) for f in _runtime_functions()
        ]
        self.note_modules()

    def note_modules(self) -> None:
        """What the functions, classes and modules in the loaded modules are; data in them may
        change."""
        kinds = self._mutable
        self._contents = [
            (
                vars(module),
                {name: value for name, value in vars(module).items() if isinstance(value, kinds)},
            )
            for name, module in self._modules.items()
            if name not in ("builtins", "sys") and isinstance(module, types.ModuleType)
        ]

    def restore(self) -> None:
        settrace, setprofile, setrecursionlimit, recursion = self.settle_calls
        settrace(None)
        setprofile(None)
        self._update(self._live_builtins, self._builtins)
        self._update(self._live_sys, self._sys)
        self._update(self._live_sys, self._streams)
        setrecursionlimit(recursion)
        self._switch(self._limits[1])
        self._int_digits(self._limits[2])
        modules = self._sys["modules"]
        for name in [name for name, module in modules.items() if module is None]:
            del modules[name]
        self._update(modules, self._modules)
        for function, code, defaults, keywords in self._functions:
            if function.__code__ is not code:
                function.__code__ = code
            function.__defaults__, function.__kwdefaults__ = defaults, keywords
        for contents, known in self._contents:
            self._update(contents, known)
        modules["__main__"] = self.main
        extra = (
            [entry for entry in sys.path if entry not in self._path]
            if isinstance(sys.path, list)
            else []
        )
        sys.path = [*self._path, *extra]  # what a cell added stays, behind the standard library
        sys.meta_path = list(self._meta_path)
        sys.path_hooks = list(self._path_hooks)
        callbacks, enable, set_threshold, threshold, set_debug = self._gc
        callbacks.clear()
        enable()
        set_threshold(*threshold)
        set_debug(0)
        threading = modules.get("threading")
        if threading is not None:
            threading._trace_hook = threading._profile_hook = None
            threading.excepthook = threading.__excepthook__
        self._arm()


def _runtime_functions() -> list[types.FunctionType]:
    """All functions and methods of the runtime, whose objects a cell can get hold of."""
    found = []
    for name, module in list(sys.modules.items()):
        if name.startswith("worker."):
            for value in vars(module).values():
                inside = (
                    vars(value).values()
                    if isinstance(value, type) and value.__module__ == name
                    else (value,)
                )
                found += [
                    f for f in inside if type(f) is types.FunctionType and f.__module__ == name
                ]
    return found


def _own(name: str) -> bool:
    return name == "__main__" or name.split(".")[0] == "worker"


def _no_audit_hook(hook) -> None:
    raise PermissionError("audit hooks cannot be added in this REPL.")
