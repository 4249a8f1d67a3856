"""The turn loop and everything around it: from a prompt and a question to a result."""

from rlm_runtime.rlm.api import RLM, Session
from rlm_runtime.rlm.results import RLMResult
from rlm_runtime.rlm.run import Run

__all__ = ["RLM", "RLMResult", "Run", "Session"]
