"""``python -m pallas_kernels.quant_matmul.bench [--device gpu|interpret-smoke] [--json FILE]``

Times the kernel and XLA's unpacked product at the shapes of `configurations`. GB/s counts what must be read and written
at least: the weight as it is stored, x and the result. TFLOP/s counts two per product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Backend, device_backend
from pallas_kernels.quant_matmul.api import quant_matmul
from pallas_kernels.quant_matmul.configurations import MODELS, TOKENS
from pallas_kernels.quant_matmul.layout import Int4Weight, int4_weight
from pallas_kernels.quant_matmul.tiles import tiles_for
from pallas_kernels.quant_matmul.walk import walk_of
from pallas_kernels.timing import parse_arguments, report, seconds_per_call

#: bytes of packed weights that the timed calls go through in turn: more than any cache holds
WEIGHT_BYTES = 2**30
GROUP_SIZE = 128

Product = Callable[[jax.Array, Int4Weight, jax.Array], jax.Array]


def random_weight(*, layers: int, n: int, k: int, group_size: int) -> Int4Weight:
    """A stack of random weights, on the device."""

    @jax.jit
    def draw(key: jax.Array) -> Int4Weight:
        packed, zeros, scales = jax.random.split(key, 3)
        groups = (layers, k // group_size, n)
        return int4_weight(
            jax.random.randint(packed, (layers, n, k // 2), 0, 256, jnp.uint8),
            jax.random.normal(scales, groups, jnp.bfloat16) / 64,
            jax.random.randint(zeros, groups, 0, 16, jnp.uint8),
        )

    return draw(jax.random.key(0))


def measure(
    product: Product, name: str, *, label: str, tokens: int, weight: Int4Weight, repeats: int = 10
) -> dict[str, Any]:
    """One line of results, for x [tokens, K]."""
    layers, n, k = weight.shape
    x = jax.random.normal(jax.random.key(1), (tokens, k), jnp.bfloat16)

    def every_layer(x: jax.Array, weight: Int4Weight) -> list[jax.Array]:
        return [product(x, weight, jnp.int32(layer)) for layer in range(layers)]

    seconds = seconds_per_call(every_layer, (x, weight), calls=layers, repeats=repeats)
    moved = sum(leaf.nbytes for leaf in jax.tree.leaves(weight)) / layers + 2 * tokens * (n + k)
    return {
        "label": label,
        "implementation": name,
        "us": seconds * 1e6,
        "GB/s": moved / seconds / 1e9,
        "TFLOP/s": 2 * tokens * n * k / seconds / 1e12,
    }


def kernel_product(backend: Backend) -> Product:
    """The kernel at any number of rows, also where the choice would be XLA: the measurement moves the border."""
    from pallas_kernels.quant_matmul.triton import quant_matmul_triton

    def product(x: jax.Array, weight: Int4Weight, layer: jax.Array) -> jax.Array:
        walk = walk_of(weight, x.dtype, backend)
        assert walk is not None
        tiles = tiles_for(rows=x.shape[0], n=weight.shape[-2], steps=walk.steps, device_kind=backend.device_kind)
        return quant_matmul_triton(x, weight, walk=walk, layer=layer, tiles=tiles, interpret=backend.interpret)

    return product


def xla_product(x: jax.Array, weight: Int4Weight, layer: jax.Array) -> jax.Array:
    return quant_matmul(x, weight, backend=Backend(implementation="xla"), layer=layer)


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    if arguments.device == "interpret-smoke":
        product = kernel_product(Backend(implementation="triton", interpret=True))
        weight = random_weight(layers=2, n=64, k=256, group_size=GROUP_SIZE)
        report([measure(product, "triton", label="smoke", tokens=4, weight=weight, repeats=1)], arguments.json)
        return
    kernel = kernel_product(device_backend(jax.devices("gpu")[0]))
    results = []
    for model, _, projections in MODELS:
        for projection, n, k in projections:
            weight = random_weight(layers=max(4, 2 * WEIGHT_BYTES // (n * k)), n=n, k=k, group_size=GROUP_SIZE)
            for tokens in (*TOKENS, 512):
                label = f"{model} {projection}, {tokens} tokens"
                results.append(measure(kernel, "triton", label=label, tokens=tokens, weight=weight))
                results.append(measure(xla_product, "xla", label=label, tokens=tokens, weight=weight))
    report(results, arguments.json)


if __name__ == "__main__":
    main()
