"""`python -m rlm_runtime` is `rlm`."""

import sys

from rlm_runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
