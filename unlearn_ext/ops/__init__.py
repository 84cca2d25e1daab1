"""The operators: typed functions over lists of tensors.

Every operator takes lists, pairs them element by element and does its work in one pass over memory. The schemas
are defined here, once, for both backends; the kernels are compiled on first use (:mod:`unlearn_ext.native`), or
replaced by PyTorch operations where there is no compiler (:mod:`unlearn_ext.ops.eager`).

Contracts that hold for all of them:

- Operands of one index must have equal shapes. Differing strides are handled; a channels_last weight with a
  contiguous gradient pairs the right elements.
- Bits are int32 words in the tensor's own memory order: weight i is bit ``i % 32`` of word ``i // 32``.
- The opmath type is float64 for float64 weights and float32 for all others; moments and slow weights have it.
- Errors name operator, argument, index, expected and got, and are raised before anything is written.
- Results are the same bits on every run and for every number of threads.
- In-place operators bump the version counters, and refuse tensors that autograd is following.
"""

from .layout import MASK_SCOPES, RULES, SCALARS, SCORES, scalars
from .operators import (
    accumulate_fisher_,
    count_bits,
    gradient_products,
    pack_bits,
    ratio_bits,
    step_,
    top_bits,
    unpack_bits,
    update,
)
from .registration import backend

__all__ = [
    "MASK_SCOPES",
    "RULES",
    "SCALARS",
    "SCORES",
    "accumulate_fisher_",
    "backend",
    "count_bits",
    "gradient_products",
    "pack_bits",
    "ratio_bits",
    "scalars",
    "step_",
    "top_bits",
    "unpack_bits",
    "update",
]
