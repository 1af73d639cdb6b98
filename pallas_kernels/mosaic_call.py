"""The one seam to Pallas' Mosaic GPU lowering. Only kernels import this: on a CPU nothing of Pallas is loaded.

Mosaic's interpreter runs copies, barriers and warpgroups and finds races between them. In JAX 0.10 it knows neither
layouts of registers nor products with a transposed right side, and in no version products whose left side is in
registers. There `Registers` computes the same from values that it reads out of shared memory; all else of a kernel is
one program for GPUs and for the interpreter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_only import gpu_only

#: rows of one warpgroup's matrix product
WGMMA_ROWS = 64
#: columns of 16-bit numbers that one 128-byte swizzle spans
SWIZZLE_COLUMNS = 64
WARPGROUP = "warpgroup"


def mosaic_call(
    kernel: Callable[..., None],
    *,
    name: str,
    out_type: Any,
    scratch_types: Sequence[Any],
    grid: Sequence[int],
    grid_names: Sequence[str],
    num_warpgroups: int,
    interpret: bool,
) -> Callable[..., Any]:
    """`plgpu.kernel` over references to whole arrays in device memory, outputs after inputs, scratch last.

    ``lax.axis_index`` of `grid_names` and of ``WARPGROUP`` tells the body where it is.
    """
    call = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=list(scratch_types),
        grid=tuple(grid),
        grid_names=tuple(grid_names),
        num_threads=num_warpgroups,
        thread_name=WARPGROUP,
        # JAX 0.10 takes layouts of registers as they are told, 0.11 would infer its own: what is told holds in all
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_interpreter() if interpret else None,
        kernel_name=name,
    )
    return call if interpret else gpu_only(call, name=name, implementation="mosaic")


def _interpreter() -> Any:
    # JAX 0.10 has it in no public place
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=True)


def races_found() -> bool:
    """Whether the interpreter's last kernel accessed memory in an order that nothing ensures."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return bool(gpu_callbacks.get_races().races_found)


def reset_interpreter() -> None:
    """To be called after an error in the interpreter, which would fail again otherwise."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()


def matrix_tile(shape: Sequence[int], dtype: Any) -> Any:
    """Shared memory [..., rows, columns] as TMA writes and matrix products read it: tiles of 8 rows by 128 bytes."""
    transforms = (plgpu.TilingTransform((8, SWIZZLE_COLUMNS)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(tuple(shape), dtype, transforms=transforms)


def _load(ref: Any, **how: Any) -> jax.Array:
    index = inspect.signature(plgpu.load).parameters.get("idx")
    needs_index = index is not None and index.default is inspect.Parameter.empty  # JAX 0.10
    return plgpu.load(ref, *([()] if needs_index else []), **how)


class Registers:
    """Values of one warpgroup, laid out as its matrix products are."""

    def __init__(self, *, interpret: bool) -> None:
        self.interpret = interpret

    def _placed(self, x: jax.Array, layout: Any) -> jax.Array:
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
        """float32 [rows, columns] or [rows]."""
        layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
        return self._placed(jnp.full(shape, value, jnp.float32), layout)

    def column_index(self, shape: tuple[int, int]) -> jax.Array:
        """i32 [rows, columns]."""
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, shape, 1)
        return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)

    def row_index(self, shape: tuple[int, int]) -> jax.Array:
        """i32 [rows, columns]."""
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, shape, 0)
        return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)

    def load_rows(self, ref: Any) -> jax.Array:
        """One number a row, from device memory."""
        if self.interpret:
            return ref[...]
        return _load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)

    def load_matrix(self, ref: Any) -> jax.Array:
        """[rows, columns] from shared memory."""
        return ref[...] if self.interpret else _load(ref, layout=plgpu.Layout.WGMMA)

    def over_columns(self, rows: jax.Array, columns: int) -> jax.Array:
        """[rows] -> [rows, columns]."""
        return lax.broadcast_in_dim(rows, (rows.shape[0], columns), [0])

    def product_transposed(self, left: Any, right: Any) -> jax.Array:
        """left [rows, k] @ right [columns, k]^T of two references to shared memory -> float32 [rows, columns]."""
        if self.interpret:
            return jnp.dot(self._read(left), self._read(right).T)

        def product(accumulator):
            plgpu.wgmma(accumulator, left, right.transpose((1, 0)))
            return accumulator[...]

        return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((left.shape[0], right.shape[0]), jnp.float32))

    def add_product(self, total: jax.Array, left: jax.Array, right: Any) -> jax.Array:
        """total + left @ right, with left in registers and right a reference to shared memory."""
        if self.interpret:
            return total + jnp.dot(left.astype(jnp.float32), self._read(right))
        product = pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, left, right))
        return product(plgpu.WGMMAAccumulatorRef.init(total))  # pyright: ignore[reportReturnType]

    def _read(self, ref: Any) -> jax.Array:
        """What a matrix product reads of shared memory."""
        x = ref[...].astype(jnp.float32)
        # a product reads as copies write, by the asynchronous proxy: without a fence between the two
        plgpu.commit_smem()
        return x
