"""Training data for models that lead the runtime: expert programs run in it, and recorded runs
filtered.

    from rlm_runtime import training
    report = training.make(["s_niah", "verbatim"], 200, seed=1, split="train", out="train.jsonl")
    report = training.filter_runs(["runs/"], out="runs.jsonl")

Both write chat JSONL, a conversation a line: `{"messages": [{"role", "content", "weight"?}, ...],
"provenance": {...}}`, which `mor_jax` trains on with `data.format = chat` (loss on assistant
messages; a weight of 0 takes a reply out of it). `experts/` holds the programs: a task's expert is
one file there.
"""

from rlm_runtime.training.filtering import FilterReport, filter_runs
from rlm_runtime.training.make import MakeReport, drill, make
from rlm_runtime.training.splits import SPLITS

__all__ = ["SPLITS", "FilterReport", "MakeReport", "drill", "filter_runs", "make"]
