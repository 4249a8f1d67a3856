"""One file a command; each is `python -m launch.NAME --help`, and `mor NAME --help` where the
package is installed."""

import importlib.util
import sys
from pathlib import Path


def _bind_configs() -> None:
    """Make `configs` the package beside this one, whatever else has that name on the path.

    A folder that people work in may have a package `configs` of its own. Where it does, its files
    are still found under names that ours does not have.
    """
    home = Path(__file__).resolve().parents[1] / "configs"
    known = sys.modules.get("configs")
    if known is not None and Path(getattr(known, "__file__", None) or "/").resolve().parent == home:
        return
    spec = importlib.util.spec_from_file_location(
        "configs",
        home / "__init__.py",
        submodule_search_locations=[str(home), str(Path.cwd() / "configs")],
    )
    assert spec is not None and spec.loader is not None, "of a file"
    module = importlib.util.module_from_spec(spec)
    sys.modules["configs"] = module
    spec.loader.exec_module(module)


_bind_configs()
