"""A checkpoint as a model of lm-eval (the package `lm_eval`), in this process."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from mor_jax.errors import UserError
from mor_jax.inference.engine.scoring import Scorer
from mor_jax.inference.sampler import Sampling
from mor_jax.inference.text import complete
from mor_jax.train.load import load_model

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


@register_model("mor")
class MorLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """`--model mor --model_args path=runs/mor`: scores by the engine's scorer, texts by the engine.

    Args (of --model_args):
      path: run directory or checkpoint, as of `train.load.load_model`.
      step: its checkpoint, the newest by default.
      average: the running mean of its weights.
      max_length: longest sequence scored; default: the model's context. Over HTTP it is one less,
        for the token that each request draws.
      max_gen_toks: of a task that does not say.
      lanes: texts generated at once.
    Others that lm-eval passes on its own (batch_size, device, ...) mean nothing here.
    Raises UserError, CheckpointError: no such model, or a length beyond its context.
    """

    def __init__(
        self,
        path: str,
        step: int | None = None,
        average: bool = False,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        lanes: int = 16,
        **_: Any,
    ):
        super().__init__()
        self._loaded = load_model(str(path), step, average=average)
        context = self._loaded.lm.model.context
        self.max_length, self._max_gen_toks, self._lanes = (
            int(max_length or context),
            int(max_gen_toks),
            int(lanes),
        )
        if not 2 <= self.max_length <= context:
            raise UserError(
                f"max_length = {self.max_length} must be from 2 to the model's context, {context}."
            )
        self._words = self._loaded.tokenizer
        self._scorer = Scorer(
            self._loaded.lm,
            self._loaded.params,
            vocab_size=self._words.vocab_size,
            max_logprobs=1,
            mesh=self._loaded.mesh,
        )

    @property
    def eot_token_id(self) -> int:
        return self._words.eos

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is scored after; as over HTTP, the token that opens
        documents."""
        return self._words.bos

    @property
    def tokenizer_name(self) -> str:
        return self._words.fingerprint()

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of the text alone."""
        return list(self._words.encode(string))

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """(sum over the continuation, whether it is what greedy decoding gives) of each; a context
        that is too long loses its beginning."""
        found = []
        for key, context, continuation in requests:
            ids = [*context, *continuation][-self.max_length :]
            scored = self._scorer.score(ids)
            first = max(1, len(ids) - len(continuation))
            own, top = scored.logprobs[first:], scored.top[first:]
            greedy = all(mine == likely[0][1] for mine, likely in zip(own, top, strict=True))
            found.append((float(sum(p for p in own if p is not None)), greedy))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, found[-1])
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, each token once, in windows of max_length."""
        totals = []
        for (text,) in (r.args for r in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string, the end of a document or the longest length; those with equal
        settings in one batch."""
        texts: dict[int, str] = {}

        def settings(i: int) -> str:
            return repr(sorted(requests[i].args[1].items()))

        for _, group in itertools.groupby(sorted(range(len(requests)), key=settings), key=settings):
            members = list(group)
            wanted: dict[str, Any] = dict(requests[members[0]].args[1])
            until = wanted.get("until") or []
            longest = int(wanted.get("max_gen_toks", wanted.get("max_tokens", self._max_gen_toks)))
            longest = min(longest, self.max_length - 1)
            temperature = (
                float(wanted.get("temperature", 0.0)) if wanted.get("do_sample", True) else 0.0
            )
            prompts = [
                self.tok_encode(requests[i].args[0])[-(self.max_length - longest) :]
                for i in members
            ]
            prompts = [ids or [self.prefix_token_id] for ids in prompts]
            done = complete(
                self._loaded,
                prompts,
                stop=[until] if isinstance(until, str) else list(until),
                max_tokens=longest,
                sampling=Sampling(temperature, top_p=float(wanted.get("top_p", 1.0))),
                lanes=self._lanes,
            )
            texts |= {i: made.text for i, made in zip(members, done, strict=True)}
            for i in members:
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return [texts[i] for i in range(len(requests))]
