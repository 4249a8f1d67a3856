"""What may change when a run goes on, and what is said where the batch no longer divides.

That another mesh restores the same bits is in test_checkpoint.py; that another number of processes
goes on with the same losses, in test_processes.py.
"""

import pytest

from mor_jax.config import check, from_dict
from mor_jax.errors import ConfigError
from mor_jax.train.workdir import differences

RAW = {"train": {"steps": 10, "batch_size": 12}}


def changed(**groups):
    old, new = from_dict(RAW).to_dict(), from_dict(RAW).to_dict()
    for group, fields in groups.items():
        new[group] |= fields
    return differences(old, new)


def test_layout_and_policies_may_change_and_the_batch_may_not():
    assert (
        changed(
            mesh={"data": 1, "fsdp": 4, "tensor": 2}, train={"accum": 3, "on_nonfinite": "rewind"}
        )
        == []
    )
    assert changed(data={"cache_dir": "/elsewhere"}) == []
    assert changed(train={"batch_size": 16}) == ["config.train.batch_size: 12 there, 16 here"]
    assert changed(data={"seed": 1}) == ["config.data.seed: 0 there, 1 here"]


def test_a_batch_that_does_not_divide_says_what_would():
    message = r"12 rows .* cannot be divided over data x fsdp = 8 .*near it that can: 8, 16; data x fsdp that can: 1, 2, 3, 4, 6, 12\."
    with pytest.raises(ConfigError, match=message):
        check(from_dict(RAW), devices=8)
