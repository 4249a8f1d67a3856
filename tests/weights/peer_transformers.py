"""What transformers computes of exported models; run by a Python that has torch and transformers.

    python peer_transformers.py OUT.npz IDS.npy DIRECTORY ...

Of each directory `name`, under "name/...": logits [T, V] of the row; cached, those of a pass over
part of it and one token at a time; padded, those of the row behind padding beside a longer one;
greedy, the ids that `generate` adds; depth [T], where the model says it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

CUT, NEW, PAD = 7, 6, 5


def past(out) -> dict:
    """The cache that a pass returned, under the name that this version of transformers has."""
    return {name: out[name] for name in ("past_key_values", "cache") if name in out}


def run(directory: str, ids: np.ndarray) -> dict[str, np.ndarray]:
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info  # no tensor too many or too few
    row = torch.from_numpy(ids)[None].long()
    with torch.no_grad():
        whole = model(row)
        found = {"logits": whole.logits[0]}
        if getattr(whole, "depth", None) is not None:
            found["depth"] = whole.depth[0]
        out = model(row[:, :CUT], use_cache=True)
        cached = [out.logits[0]]
        for i in range(CUT, row.shape[1]):
            out = model(row[:, i : i + 1], **past(out), use_cache=True)
            cached.append(out.logits[0])
        found["cached"] = torch.cat(cached)
        two = torch.cat([torch.cat([row[:, :PAD] * 0, row[:, :-PAD]], 1), row.flip(1)])
        mask = torch.ones_like(two)
        mask[0, :PAD] = 0
        found["padded"] = model(two, attention_mask=mask).logits[0, PAD:]
        grown = model.generate(
            two[:, :-NEW],
            attention_mask=mask[:, :-NEW],
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
        )
        found["greedy"] = grown[0, -NEW:]
        beams = model.generate(row[:, :CUT], max_new_tokens=3, num_beams=3, do_sample=False)
        plain = model.generate(
            row[:, :CUT], max_new_tokens=3, num_beams=3, do_sample=False, use_cache=False
        )
        assert torch.equal(beams, plain), (beams, plain)
    return {name: x.numpy() for name, x in found.items()}


if __name__ == "__main__":
    ids = np.load(sys.argv[2])
    torch.set_num_threads(1)
    found = {}
    for directory in sys.argv[3:]:
        of = run(directory, ids)
        found |= {f"{Path(directory).name}/{name}": x for name, x in of.items()}
    np.savez(sys.argv[1], **found)
