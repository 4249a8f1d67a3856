"""Compare runs on one self-contained HTML page: table, curves, depth maps, samples, configs side by
side.

    python -m launch.report runs/mor runs/vanilla --out report.html
    python -m launch.report runs/mor --text my_file.py

The page needs no server and no network. The depth map shows held-out text, each token coloured by
its recursions.

From a notebook:

    from mor_jax.train.present import present
    present(["runs/mor", "runs/vanilla"], "report.html")
"""

from absl import flags

from launch import cli
from mor_jax.errors import UserError
from mor_jax.paths import as_path
from mor_jax.train.present import present

_OUT = flags.DEFINE_string("out", "report.html", "The page to write.")
_TEXT = flags.DEFINE_string(
    "text", None, "A text file for the depth map; a held-out passage of the run by default."
)


def main(runs: list[str]) -> None:
    if not runs:
        raise UserError(
            "name at least one run directory, e.g. python -m launch.report runs/mor runs/vanilla."
        )
    try:
        text = as_path(_TEXT.value).read_text(encoding="utf-8") if _TEXT.value else None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--text {_TEXT.value}: cannot be read as text ({e}).") from e
    print(f"wrote {present(runs, _OUT.value, text=text)}")


if __name__ == "__main__":
    cli.run(main, arguments=True)
