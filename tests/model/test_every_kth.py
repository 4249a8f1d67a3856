"""Every k-th token of a document goes deep, whatever row it is packed into."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mor_jax.config import DepthConfig, ModelConfig
from mor_jax.model.depth import TokenInfo
from mor_jax.model.lm import positions_in_document

MODEL = ModelConfig(layers=6, recursions=3, sharing="cycle", context=40)


def depths(depth, seg):
    policy, pos = depth.build(MODEL), positions_in_document(jnp.asarray(seg))
    h_BxTxD = jnp.zeros((*pos.shape, 1))
    return np.asarray(
        policy.begin({}, h_BxTxD, TokenInfo(jnp.asarray(seg) > 0, pos)).tokens.depth_BxT
    )


def test_which_tokens():
    seg = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0]])
    assert depths(DepthConfig("every_kth", every=3), seg).tolist() == [
        [1, 1, 3, 1, 1, 1, 1, 3, 1, 1, 3, 0]
    ]
    assert depths(DepthConfig("every_kth", every=4, shallow=2), seg).tolist() == [
        [2, 2, 2, 3, 2, 2, 2, 2, 3, 2, 2, 0]
    ]


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=12),
    st.integers(1, 7),
    st.sampled_from([1, 4]),
)
def test_row_sizes_hold_every_packing(lengths, every, tile):
    seg = np.repeat(1 + np.arange(len(lengths)), lengths)[None, :40]
    depth = DepthConfig("every_kth", every=every, tile=tile)
    ran = [(depths(depth, seg) > r).sum() for r in range(3)]
    (sizes,) = depth.build(MODEL).profiles(seg.shape[1])
    assert all(n <= size for n, size in zip(ran, sizes, strict=True)) and sizes[0] == seg.shape[1]
    assert sizes[1] <= max(1, -(-(seg.shape[1] // every) // tile) * tile)
