"""Writing keys and values, every implementation: what lies where afterwards, and that nothing else has changed."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import LAYER, PagedCase, Sequences, Shape, as_stored, sequences
from test_paged_attention import IMPLEMENTATIONS, backend

from pallas_kernels.backend import Backend
from pallas_kernels.kv_write.api import write_kv
from pallas_kernels.storage import check_addressable

SHAPES = (
    Shape(heads=5, kv_heads=5, dim=8, block=16),
    Shape(heads=1, kv_heads=1, dim=80, block=8, tokens=24, query="bfloat16", stored="bfloat16"),
    Shape(heads=3, kv_heads=3, dim=10, block=64, stored="uint16"),
    Shape(heads=2, kv_heads=2, dim=24, block=32, stored="int8"),
    Shape(heads=2, kv_heads=2, dim=16, block=128, query="bfloat16", stored="float8_e4m3fn"),
)


@jax.jit
def write(cache, key, value, layout, batch, scales):
    return write_kv(cache, key, value, layout, batch, scales)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(data=st.data())
@settings(max_examples=6)
def test_new_rows_are_written_and_no_others(implementation: str, shape: Shape, interpret: bool, data: st.DataObject):
    case = PagedCase(shape, data.draw(sequences(shape)))
    random = np.random.default_rng(case.drawn.seed)
    size = (2, shape.tokens, shape.kv_heads, shape.dim)
    new = (random.standard_normal(size) * random.choice([0, 1e-3, 1, 1e3], (*size[:-1], 1))).astype(shape.query)
    batch = dataclasses.replace(case.batch, backend=backend(implementation, interpret))
    expected, expected_scales = case.cache.copy(), None if case.scales is None else case.scales.copy()
    numbers = new.astype(np.float32)
    stored, scales = (numbers.astype(shape.number), None) if not shape.has_scales else quantized(numbers, shape.number)
    stored = stored.view(np.uint16) if shape.stored == "uint16" else stored
    for seq, before in enumerate(case.drawn.computed):
        for i, token in enumerate(range(*case.tokens(seq).indices(shape.tokens))):
            at = before + i
            page, slot = LAYER * shape.num_blocks + case.table[seq, at // shape.block], at % shape.block
            expected[page, :, slot] = np.concatenate(stored[:, token])
            if scales is not None and expected_scales is not None:
                expected_scales[page, :, slot] = np.concatenate(scales[:, token])

    expected, cache = (as_stored(pages, batch.backend) for pages in (expected, case.cache))
    cache, found_scales = write(cache, *map(jnp.asarray, new), case.layout, batch, case.scales)

    # page 0 takes the padding
    if scales is None:
        np.testing.assert_array_equal(np.asarray(cache)[1:].view(np.uint8), expected[1:].view(np.uint8))
        return
    np.testing.assert_allclose(np.asarray(found_scales)[1:], expected_scales[1:], rtol=1e-6)  # pyright: ignore
    # a division that is rounded otherwise may go to the neighbour
    step = 1 if shape.stored == "int8" else 0.125 * abs(expected[1:].astype(np.float32)) + 2.0**-9
    assert (abs(np.asarray(cache)[1:].astype(np.float32) - expected[1:].astype(np.float32)) <= step).all()
    assert (np.asarray(cache)[1:] == expected[1:]).mean() > 0.999


def quantized(x: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Rows as fractions of their largest number."""
    integer = np.issubdtype(dtype, np.integer)
    largest = 127.0 if integer else float(ml_dtypes.finfo(dtype).max)
    scales = abs(x).max(axis=-1) / np.float32(largest)
    fractions = x / np.where(scales == 0, 1, scales)[..., None]
    return np.clip(np.rint(fractions) if integer else fractions, -largest, largest).astype(dtype), scales


@pytest.mark.parametrize(
    ("gigabytes", "dtype", "fits"),
    [
        (2, "int8", True),
        (3, "int8", False),
        (5, "int8", True),
        (3, "float8_e4m3fn", False),
        (3, "bfloat16", True),
        (5, "bfloat16", True),
        (40, "int8", False),
    ],
)
def test_caches_that_addresses_do_not_reach_are_refused(gigabytes: int, dtype: str, fits: bool):
    rows = gigabytes * 2**30 // jnp.dtype(dtype).itemsize // 16
    cache = jax.ShapeDtypeStruct((rows // 256, 2 * 8, 16, 16), jnp.dtype(dtype))
    if fits:
        check_addressable(cache)
        return
    with pytest.raises(ValueError, match="more than"):
        check_addressable(cache)


def test_the_operation_refuses_them_too():
    """Not before kernels are to be compiled: XLA's scatter has no such limit."""
    shape = Shape(heads=2, kv_heads=2, dim=16, block=16, tokens=8, stored="int8")
    case = PagedCase(shape, Sequences(computed=(3,), queries=(1,), window=9, shared=0, magnitude=1.0, seed=0))
    cache = jax.ShapeDtypeStruct((3 * 2**30 // 1024, 2 * 2, 16, 16), jnp.int8)
    scales = jax.ShapeDtypeStruct(cache.shape[:-1], jnp.float32)
    new = jax.ShapeDtypeStruct((8, 2, 16), jnp.float32)
    for implementation in ("triton", "xla"):
        batch = dataclasses.replace(case.batch, backend=Backend(implementation=implementation, interpret=True))
        trace = functools.partial(jax.eval_shape, write_kv, cache, new, new, case.layout, batch, scales)
        if implementation == "xla":
            trace()
            continue
        with pytest.raises(ValueError, match="cannot be addressed"):
            trace()
