"""The worker's first lines, started by path with `python -I -S`.

The runtime's modules are loaded from this folder with built-ins of their own, a copy taken before
any cell: a cell that replaces `len` for everybody replaces it for itself.
"""

import builtins
import os
import sys
from _frozen_importlib_external import SourceFileLoader, spec_from_file_location

HERE = os.path.dirname(os.path.abspath(__file__))
OWN = dict(vars(builtins))


class Loader(SourceFileLoader):
    def exec_module(self, module):
        module.__builtins__ = OWN
        super().exec_module(module)


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "worker":
            file, parts = os.path.join(HERE, "__init__.py"), [HERE]
        elif name.startswith("worker."):
            file, parts = os.path.join(HERE, name[7:] + ".py"), None
        else:
            return None
        return spec_from_file_location(
            name, file, loader=Loader(name, file), submodule_search_locations=parts
        )


sys.meta_path.insert(0, Finder)
from worker import service  # noqa: E402

sys.meta_path.remove(Finder)
service.main(sys.argv[1:])
