"""What all commands share: one clear line for a person's mistake, and the compilation cache."""

from __future__ import annotations

import ast
import dataclasses
import io
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from mor_jax.analysis.tpu_compiler import quiet_without_tpu
from mor_jax.config import Config, from_config_dict, switched
from mor_jax.errors import ConfigError, UserError
from mor_jax.parallel.join import hosts
from mor_jax.paths import as_path, reason, use_compilation_cache, write_text

if TYPE_CHECKING:
    from mor_jax.analysis.sweep import Sweep

# the folder that holds launch/ and configs/, of a checkout or of a wheel
HOME = Path(__file__).resolve().parents[1]


def run(main: Callable[[list[str]], Any], *, arguments: bool = False) -> NoReturn:
    """Parse flags and call `main` with the plain arguments, which are refused unless `arguments`.

    A UserError becomes `error: ...` on stderr and exit status 2, without a traceback.
    """
    logging.set_verbosity(logging.ERROR)
    # an ASCII terminal shows "?" where it cannot show a letter
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook has another kind
        sys.stdout.reconfigure(errors="replace")
    quiet_without_tpu()

    def guarded(argv: list[str]) -> None:
        use_compilation_cache()
        if len(argv) > 1 and not arguments:
            raise UserError(f"argument {argv[1]!r} is not a flag; see --help.")
        main(argv[1:])

    try:
        app.run(guarded, flags_parser=_parse)
    except UserError as e:
        _fail(str(e))
    except KeyboardInterrupt:
        _fail("interrupted", status=130)
    except Exception as e:
        if traceback.extract_tb(e.__traceback__)[-1].filename.endswith("xla_bridge.py"):
            _fail(_no_backend(e))
        if hosts().count == 1:
            raise
        traceback.print_exc()
        hosts().leave(1)  # an ordinary exit would wait for the others
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _parse(argv: list[str]) -> list[str]:
    """Flags, with the errors of config files and overrides in one line. `--help` shows the
    command's own flags."""
    argv = [argv[0], *_readable(argv[1:])]
    if any(a in ("--help", "-h", "-help") for a in argv):
        argv = [a for a in argv if a not in ("--help", "-h", "-help")] + ["--helpshort"]
    try:
        return flags.FLAGS(argv)
    except flags.Error as e:
        _fail(f"{e} (see --help)")
    except UserError:
        raise
    # how config_flags reports a bad override
    except (AttributeError, KeyError, ValueError, TypeError) as e:
        _fail(f"--config: {_override_error(e)}")


def _readable(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--config configs/mor.py` found where our own are, and whole numbers spelt
    as such: 1e3 is 1000."""
    found: list[str] = []
    end = False
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        end = end or argument == "--"
        if not end and found and found[-1].lstrip("-") == "config" and found[-1].startswith("-"):
            argument = find_config(argument)
        elif not end and argument.startswith("-") and equals and name == "config":
            argument = f"--config={find_config(value)}"
        elif (
            not end
            and argument.startswith("-")
            and equals
            and name.startswith("config.")
            and _is_whole(name, value)
        ):
            argument = f"--{name}={int(float(value))}"
        found.append(argument)
    return found


def _is_whole(field: str, text: str) -> bool:
    """Whether a field of whole numbers is given one in the notation of others, such as 1e3 or
    2.5e4."""
    default: Any = Config().to_dict()
    for key in field.split(".")[1:]:
        default = default.get(key) if isinstance(default, dict) else None
    if type(default) is not int or not re.fullmatch(r"[+-]?\d+(\.\d*)?[eE]\+?\d+", text):
        return False
    return float(text).is_integer()


def find_config(spec: str) -> str:
    """`file.py` or `file.py:argument`; where there is no such file here but one of ours has that
    name, ours.

    So `configs/mor.py:360m` works in any folder."""
    path, colon, argument = spec.partition(":")
    if os.path.exists(path) or os.path.isabs(path):
        return spec
    parts = Path(path).parts
    if parts[:1] == ("configs",) and (HOME / path).is_file():
        return f"{HOME / path}{colon}{argument}"
    return spec


def _override_error(e: Exception) -> str:
    """One line from what config_flags raises; a KeyError would print its message quoted, and may be
    a bare name."""
    cause = e
    while isinstance(cause, Exception) and cause.args:  # it wraps one KeyError in another
        cause = cause.args[0]
    text = " ".join(str(cause).split())
    if isinstance(e, (KeyError, AttributeError)) and text.strip("'\"").isidentifier():
        name = text.strip("'\"")
        return f"the configuration file has no field {name!r} to override; check its name, or write it into the file."
    return text


def _no_backend(error: Exception) -> str:
    """What JAX says, in the file that looks for devices, when those it was told to use are not
    there."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    why = (str(error).strip().splitlines() or ["none was found"])[0][:200].rstrip(".")
    extras = {"cuda": "gpu", "gpu": "gpu", "tpu": "tpu"}
    extra = next((extras[name] for name in asked.split(",") if name in extras), "")
    install = f' install it with pip install ".[{extra}]",' if extra else ""
    return f"JAX cannot use the devices that JAX_PLATFORMS={asked!r} asks for ({why}):{install} or unset JAX_PLATFORMS."


def write_out(path: str, text: str) -> None:
    """Write the file that an --out flag names, here or in an object store. Raises UserError."""
    try:
        write_text(as_path(path), text)
    except OSError as e:
        raise UserError(f"cannot write {path}: {reason(e)}.") from e


def _fail(message: str, status: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    hosts().leave(status)


def define_config(default: str | None = None) -> Any:
    """The --config flag: a file under configs/, `:argument` after it, and
    --config.group.field=value overrides."""
    holder = config_flags.DEFINE_config_file(
        "config",
        default and find_config(default),
        "Configuration file, e.g. configs/quickstart.py or configs/mor.py:360m,nr=3. "
        "Any field can be overridden: --config.train.steps=200.",
    )
    # so that --help shows it
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])
    return holder


def read_config(holder: Any, *, devices: int | None = None) -> Config:
    """The typed, checked configuration behind the --config flag. `devices`: those its mesh spans;
    default: all here."""
    value = holder.value
    if value is None:
        raise ConfigError("--config is missing, e.g. --config configs/quickstart.py.")
    try:
        # config_flags puts off the error of an unreadable file until it is used
        value = value.to_dict()
    except OSError as e:
        why = str(e).strip().splitlines()[-1].strip()
        raise ConfigError(f"--config: {why}. Configurations are under configs/.") from e
    given = config_flags.get_override_values(flags.FLAGS[holder.name])
    if "depth.policy" in given:  # what the file set for another policy is left behind
        value["depth"] = switched(value["depth"], [key.removeprefix("depth.") for key in given])
    return from_config_dict(value, devices=devices or jax.device_count())


def read_sweep(spec: str, seeds: Sequence[str] = ()) -> Sweep:
    """The `Sweep` that a file's `get_sweep(argument)` returns; `spec` is `path.py` or
    `path.py:argument`.

    Raises ConfigError: no such file, no such function, or seeds that are not whole numbers.
    """
    # it draws: half a second that no other command should pay
    from mor_jax.analysis.sweep import Sweep

    path, _, argument = find_config(spec).partition(":")
    if not Path(path).is_file():
        known = ", ".join(
            sorted(
                p.name for p in (HOME / "configs/ablations").glob("[!_]*.py") if p.stem != "sizes"
            )
        )
        raise ConfigError(
            f"there is no sweep file {path}."
            + (f" configs/ablations/ has {known}." if known else "")
        )
    get_sweep = runpy.run_path(path).get("get_sweep")
    if get_sweep is None:
        raise ConfigError(f"{path} has no function get_sweep(arg), so it is no sweep file.")
    sweep: Sweep = Sweep.from_dict(get_sweep(argument))
    try:
        return dataclasses.replace(sweep, seeds=tuple(map(int, seeds))) if seeds else sweep
    except ValueError as e:
        raise ConfigError(f"--seeds must be whole numbers, got {','.join(seeds)}.") from e


def read_fields(settings: Sequence[str]) -> dict[str, Any]:
    """`["train.steps=200", "data.source=files"]` as a dict; values are Python literals, or else
    text."""
    fields = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(
                f"--set {setting!r} must have the form field=value, e.g. --set train.steps=200."
            )
        try:
            fields[key.removeprefix("config.")] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            fields[key.removeprefix("config.")] = text
    return fields
