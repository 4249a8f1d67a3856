"""One completion of the official `rlms` (its in-process REPL) for `rlm_overhead`; see
`rlm_driver.py` for the job."""

import json
import sys
import time


def main() -> None:
    job = json.loads(sys.argv[1])
    with open(job["context"]["path"], encoding="utf-8") as file:
        prompt = file.read()
    before = time.monotonic()
    from rlm import RLM

    def model(name: str) -> dict[str, str]:
        return {"model_name": name, "base_url": job["url"], "api_key": "k"}

    rlm = RLM(
        backend="openai",
        backend_kwargs=model("root"),
        other_backends=["openai"],
        other_backend_kwargs=[model("sub")],
        environment="local",
        max_iterations=job["turns"] + 1,
    )
    called = time.monotonic()
    result = rlm.completion(prompt, root_prompt="What does it say?")
    returned = time.monotonic()
    print(
        json.dumps(
            {
                "answer": result.response,
                "called": called,
                "returned": returned,
                "import_seconds": called - before,
            }
        )
    )


if __name__ == "__main__":
    main()
