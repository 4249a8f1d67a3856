"""Peak speed of known accelerators: the denominator of MFU."""

from __future__ import annotations

import re

# (whole words of jax's `device_kind`, lower case; dense bfloat16 FLOP/s; float32 FLOP/s), first
# match wins, so the special name stands before the general one. Vendors' data sheets, without
# structured sparsity. float32 means what `jax`
# does with float32 products by default: TF32 on NVIDIA, one bfloat16 pass on TPU.
_PEAKS = (
    ("h100 pcie", 756e12, 378e12),
    ("h100 nvl", 835e12, 417e12),
    ("h100", 989e12, 494e12),
    ("h200", 989e12, 494e12),
    ("gh200", 989e12, 494e12),
    ("b200", 2250e12, 1125e12),
    ("a100", 312e12, 156e12),
    ("l40s", 362e12, 183e12),
    ("l4", 121e12, 60e12),
    ("tpu v6 lite", 918e12, 918e12),
    ("tpu v6e", 918e12, 918e12),
    ("tpu v5 lite", 197e12, 197e12),
    ("tpu v5e", 197e12, 197e12),
    ("tpu v5p", 459e12, 459e12),
    ("tpu v5", 459e12, 459e12),
    ("tpu v4 lite", 138e12, 138e12),
    ("tpu v4", 275e12, 275e12),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Dense peak FLOP/s of one device, or None when unknown (a CPU, a new chip, another dtype).

    Args:
      device_kind: as in `jax.devices()[0].device_kind`, e.g. "NVIDIA H100 80GB HBM3" or "TPU v5
        lite".
      dtype: "bfloat16" or "float32", of the matrix products.
    """
    if dtype not in ("bfloat16", "float32"):
        return None
    kind = device_kind.lower()
    for name, bfloat16, float32 in _PEAKS:
        if re.search(rf"\b{name}\b", kind):  # whole words: "a100" is also inside "rtx a1000"
            return bfloat16 if dtype == "bfloat16" else float32
    return None
