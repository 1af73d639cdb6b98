"""A matrix of one layer, read where those of all layers lie: for products of a single row on a CPU.

There a step of one token does little but read weights. XLA:CPU copies a layer's matrix out of the stack before it
multiplies it, and has no good product of one bfloat16 row; elementwise operations it compiles to loops that read the
stack as it is, in vectors and on all cores. Such a loop has the in-features in parts as wide as a few vectors, which
are multiplied and added up lane by lane; what the lanes hold is added up in the end. (In bfloat16, SmolLM2's layers: 8
ms instead of 14; its head: 2.9 instead of 4. In float32, the layers of Gemma 3 270M: 45 instead of 63.)

bfloat16 numbers are read as uint16: a slice of a bfloat16 array XLA:CPU widens to float32 and narrows again.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.storage import from_storage

#: in-features come in multiples of it: a vector
LANES = 16
#: most parts of the in-features, each a term of the compiled loop: more of them take longer to compile, fewer leave
#: more lanes to be added up
MAX_PARTS = 36
#: whose numbers can be read so
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedMatrix:
    """[out, in] of a layer: what `linear` takes in place of a weight, for x of one row."""

    #: [L, out, in]: float32, or uint16, the bits of bfloat16
    stored: jax.Array
    #: i32 [], unknown to the compiler; None: of all layers
    layer: jax.Array | None = None
    #: [out, in], the same for x of several rows; None: there is no such x
    several: jax.Array | None = None

    def of_layer(self, layer: jax.Array) -> StackedMatrix:
        return dataclasses.replace(self, layer=layer)


def can_be_read(weight: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether a weight [L, out, in] or [out, in] can be a `StackedMatrix`, and its parts are narrow: lanes that are as
    wide as a row cost more than they save.
    """
    in_features = weight.shape[-1]
    if weight.dtype not in DTYPES or in_features % LANES:
        return False
    width = _part_width(in_features)
    return width <= 4 * LANES or width * 8 <= in_features


def one_row_product(x: jax.Array, weight: StackedMatrix) -> jax.Array:
    """``x [1, in] @ weight [out, in].T`` -> float32 [1, out], accumulated in float32."""
    _, out_features, in_features = weight.stored.shape
    assert x.shape == (1, in_features) and weight.layer is not None
    width = _part_width(in_features)
    row = x[0].astype(jnp.float32)
    lanes = jnp.zeros((out_features, width))
    for first in range(0, in_features, width):
        # out of the whole stack, not out of a layer's matrix: that would be copied, and widened as a whole
        part = lax.dynamic_slice(weight.stored, (weight.layer, 0, first), (1, out_features, width))[0]
        lanes += from_storage(part, lanes.dtype) * row[first : first + width]
    ones = jnp.ones((width, 1))
    return lax.dot_general(lanes, ones, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST).T


def _part_width(in_features: int) -> int:
    """The narrowest that needs no more than `MAX_PARTS` parts."""
    widths = range(LANES, in_features + 1, LANES)
    return next(width for width in widths if in_features % width == 0 and in_features <= width * MAX_PARTS)
