"""Run tasks of lm-eval on a checkpoint, in this process (the extra `lm-eval`).

    python -m launch.lm_eval --model mor --model_args path=runs/mor --tasks mine \\
        --include_path tasks

All arguments are lm-eval's own (`lm_eval --help`); this command adds the model `mor`. lm-eval has
no entry points through which a package could add one, so its own command does not know of it.
--model_args: path, and optionally step, average, max_length, max_gen_toks, lanes
(`mor_jax/train/harness.py`).
"""

import sys

from launch import cli
from mor_jax.errors import UserError


def main(arguments: list[str]) -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise UserError(
            'launch.lm_eval needs the package lm-eval: pip install ".[lm-eval]".'
        ) from None
    import mor_jax.train.harness  # noqa: F401 - registers the model

    sys.argv[1:] = arguments
    cli_evaluate()


if __name__ == "__main__":
    given = sys.argv[1:]
    if not {"-h", "--help", "--helpfull", "--helpshort"} & set(given):
        del sys.argv[1:]  # they are not ours to read
    cli.run(lambda _: main(given))
