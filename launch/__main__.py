"""All commands of mor_jax under one name.

    mor train --config configs/quickstart.py --workdir runs/mor
    mor generate --checkpoint runs/mor --prompt "def main("
    mor COMMAND --help

The same as `python -m launch.COMMAND`, and works in a folder that has a package named `launch` of
its own.
"""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOT_COMMANDS = {"__init__", "__main__", "cli", "jobs", "servers"}


def commands() -> dict[str, str]:
    """{name: first line of its help}"""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        if path.stem not in NOT_COMMANDS:
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = text.partition("\n")[0]
    return found


def main(argv: list[str] | None = None) -> None:
    """Run one command as `python -m launch.COMMAND` would."""
    arguments = sys.argv[1:] if argv is None else argv
    known = commands()
    name = arguments[0].replace("-", "_") if arguments else ""
    if name in known:
        # What a command's own configuration imports from the working folder is found, after all
        # that is installed.
        sys.path[:] = [p for p in sys.path if p != ""] + [str(Path.cwd())]
        sys.argv = [f"mor {name}", *arguments[1:]]
        try:
            runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)
        except ModuleNotFoundError as e:
            if (e.name or "").partition(".")[0] in ("launch", "configs", "mor_jax", "rlm_runtime"):
                raise
            sys.exit(
                f"error: mor {name} needs the package {e.name}, which is not installed here: pip install {e.name}."
            )
        return
    listing = "\n".join(f"  {key:<12} {text}" for key, text in known.items())
    print(
        f"{__doc__}\nCommands:\n\n{listing}",
        file=sys.stdout if name in ("", "__help", "_h") else sys.stderr,
    )
    if name not in ("", "__help", "_h"):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"error: there is no command {arguments[0]!r}.{hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    if __package__ in (None, ""):  # run as a file: the folder above holds the packages
        sys.path[0] = str(HERE.parent)
    main()
