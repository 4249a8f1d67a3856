"""One completion of `dspy.RLM` (LocalInterpreter: a subprocess) for `rlm_overhead`; see
`rlm_driver.py` for the job."""

import json
import sys
import time


def main() -> None:
    job = json.loads(sys.argv[1])
    with open(job["context"]["path"], encoding="utf-8") as file:
        prompt = file.read()
    before = time.monotonic()
    import dspy
    from dspy.primitives.local_interpreter import LocalInterpreter

    def model(name: str) -> dspy.LM:
        return dspy.LM(f"openai/{name}", api_base=job["url"], api_key="k", cache=False)

    dspy.configure(lm=model("root"))
    rlm = dspy.RLM(
        "context, query -> answer",
        max_iters=job["turns"] + 1,
        max_llm_calls=1_000_000,
        sub_lm=model("sub"),
        interpreter_factory=LocalInterpreter,
    )
    called = time.monotonic()
    result = rlm(context=prompt, query="What does it say?")
    returned = time.monotonic()
    print(
        json.dumps(
            {
                "answer": result.answer,
                "called": called,
                "returned": returned,
                "import_seconds": called - before,
            }
        )
    )


if __name__ == "__main__":
    main()
