"""One completion of `rlm_runtime` for `rlm_overhead`, in a process of its own: a job in, what
happened out, as JSON.

The drivers of the peers (`peers/rlm_*.py`) do the same with their libraries. A job: `url` of the
model server, `turns` the script takes at most, `context` (`text` or `path`: the file's text, or the
file itself), `log_dir` or null.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    job = json.loads(sys.argv[1])
    sys.path.insert(0, job["root"])
    context = job["context"]
    prompt = Path(context["path"]) if context["kind"] == "file" else None
    if prompt is None:
        with open(context["path"], encoding="utf-8") as file:
            prompt = file.read()
    before = time.monotonic()
    from rlm_runtime import RLM
    from rlm_runtime.lms.openai import OpenAILM

    models = [OpenAILM(name, base_url=job["url"], api_key="k") for name in ("root", "sub")]
    rlm = RLM(*models, budget={"turns": job["turns"] + 1}, log_dir=job["log_dir"])
    called = time.monotonic()
    result = rlm.completion(prompt, "What does it say?")
    returned = time.monotonic()
    sandbox = result.sandbox.layers if result.sandbox else {}
    facts = {
        "stop_reason": result.stop_reason,
        "sandbox": sandbox,
        "error": result.error,
        "notes": result.notes,
    }
    print(
        json.dumps(
            {
                "answer": result.answer,
                "called": called,
                "returned": returned,
                "import_seconds": called - before,
                **facts,
            }
        )
    )


if __name__ == "__main__":
    main()
