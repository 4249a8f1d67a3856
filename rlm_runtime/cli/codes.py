"""Exit codes, and the one line an error becomes."""

from __future__ import annotations

import contextlib
import re
import sys

from rlm_runtime.errors import (
    BudgetExceeded,
    Cancelled,
    ContextError,
    LMError,
    SandboxError,
    UsageError,
)
from rlm_runtime.terminal import clean

OK, FAILED, USAGE, PARTIAL, ENDPOINT, SANDBOX, CANCELLED = 0, 1, 2, 3, 4, 5, 130

TABLE = """\
exit codes:
  0    answered, or done
  1    the run failed
  2    wrong usage: an option, a missing or unreadable file, an empty context, an unknown model
  3    a limit was reached: the answer on standard output is the best there was, or missing
  4    a language model's endpoint failed: wrong key, unknown model, no connection, ...
  5    a required layer of the sandbox is missing on this machine
  130  cancelled (Ctrl-C or SIGTERM); what answer there was is on standard output"""


def code_of(error: BaseException) -> int:
    kinds = (
        (SandboxError, SANDBOX),
        (LMError, ENDPOINT),
        (BudgetExceeded, PARTIAL),
        ((Cancelled, KeyboardInterrupt), CANCELLED),
        ((UsageError, ContextError), USAGE),
    )
    return next((code for kind, code in kinds if isinstance(error, kind)), FAILED)


def complain(text: str) -> None:
    """One line on standard error."""
    tell(f"rlm: {one_line(text)}")


def tell(text: str) -> None:
    """To standard error. Nobody may be there to read it, which is no reason to fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(text, file=sys.stderr, flush=True)


def one_line(text: str, limit: int = 2_000) -> str:
    line = re.sub(r"\s*\n\s*", " ", clean(text)).strip()
    return line if len(line) <= limit else line[:limit] + " ..."
