"""A tokenizer for small models that lead the runtime: single bytes, common words, and the protocol
in long pieces.

Code and prompts of the protocol become a few tokens a turn. A string that is not known by heart is
always spelled in bytes, in the same way wherever it stands, behind a space or a quotation mark: to
copy it is to copy token by token, which a BPE of one vocabulary for both would spoil (" ama" +
"zon" and "amazon").
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rlm_runtime.errors import UsageError
from rlm_runtime.training.english import common

# ends of documents, and ChatML's of turns
SPECIALS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
WORD = re.compile(r"[A-Za-z]{2,}")
SENTENCE = re.compile(r"[^.\n]+\.[ \n]")  # of texts that many contexts share
LITERAL = re.compile(r'"(?:[^"\\\n]|\\.)*"')
SHARE = 0.01  # of the conversations: what stands in fewer is no phrase
SHORTEST = 6  # characters of a phrase


def learn(path: str | Path, out: str | Path) -> int:
    """Write the tokenizer.json of a file of conversations; returns the size of its vocabulary."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as e:
        raise UsageError(f"a tokenizer needs the package {e.name}: pip install tokenizers.") from e

    # the template writes them
    words = Counter({role: 1 << 30 for role in ("system", "user", "assistant")})
    phrases: Counter[str] = Counter()
    total = 0
    with open(path, encoding="utf-8") as file:
        for line in file:
            messages, total = json.loads(line)["messages"], total + 1
            words.update({w for m in messages for w in WORD.findall(m["content"])})
            phrases.update({p for m in messages for p in _pieces(m)})
    least = max(2, SHARE * total)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    hf = Tokenizer(models.BPE({name: i for i, name in enumerate([*SPECIALS, *alphabet])}, []))
    hf.pre_tokenizer, hf.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    hf.add_special_tokens(list(SPECIALS))
    kept = sorted(p for p, n in phrases.items() if n >= least and len(p) >= SHORTEST)
    single = sorted({*common(), *(w for w, n in words.items() if n >= least)})
    hf.add_tokens([AddedToken(p, normalized=False) for p in kept])
    hf.add_tokens(
        [AddedToken(w, normalized=False, single_word=True) for w in single if w not in kept]
    )
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(hf.to_str(), encoding="utf-8")
    return hf.get_vocab_size()


def _pieces(message: dict[str, str]) -> Iterator[str]:
    """What may be a phrase: of the model's code all between its string literals, of what it is told
    whole lines or sentences."""
    text = message["content"]
    # what a string says may vary, so it is no part of a phrase; a pattern does not
    if message["role"] == "assistant":
        begin = 0
        for literal in LITERAL.finditer(text):
            if "\\" not in literal[0]:
                yield text[begin : literal.start() + 1]
                begin = literal.end() - 1
        yield text[begin:]
    elif message["role"] == "system":
        yield text
    else:
        yield from SENTENCE.findall(text)
