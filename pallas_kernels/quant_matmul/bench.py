"""``python -m pallas_kernels.quant_matmul.bench [--device gpu|interpret-smoke] [--json FILE]``

Times the kernel and XLA's unpacked product at the shapes of `configurations`, and every form beside bfloat16 at one.
GB/s counts what must be read and written at least: the weight as it is stored, x and the result. TFLOP/s counts two per
product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backend import Backend, device_backend
from pallas_kernels.quant_matmul.api import quant_matmul
from pallas_kernels.quant_matmul.configurations import FORMS, INT4, MODELS, TOKENS, Form
from pallas_kernels.quant_matmul.tiles import tiles_for
from pallas_kernels.quant_matmul.walk import walk_of
from pallas_kernels.timing import parse_arguments, report, seconds_per_call

#: bytes of packed weights that the timed calls go through in turn: more than any cache holds
WEIGHT_BYTES = 2**30

Product = Callable[[jax.Array, Any, Any], jax.Array]


def random_weight(form: Form | None, n: int, k: int, *stack: int) -> Any:
    """A stack of random weights [*stack, N, K], on the device; of no form: bfloat16."""
    shapes = jax.ShapeDtypeStruct((*stack, n, k), jnp.bfloat16) if form is None else form.shapes(n, k, *stack)

    @jax.jit
    def draw(key: jax.Array) -> Any:
        leaves, tree = jax.tree.flatten(shapes)
        return tree.unflatten(map(_random, jax.random.split(key, len(leaves)), leaves))

    return draw(jax.random.key(0))


def _random(key: jax.Array, like: Any) -> jax.Array:
    """Numbers in 16 and 32 bits are small; bytes are any, but for NaN."""
    if jnp.issubdtype(like.dtype, jnp.floating) and like.dtype.itemsize > 1:
        return jax.random.normal(key, like.shape, like.dtype) / 64
    bits = jax.random.bits(key, like.shape, jnp.uint8)
    # the exponent's highest bit is that of all NaNs
    bits = bits & jnp.uint8(0xBF) if like.dtype == jnp.float8_e4m3fn else bits
    return lax.bitcast_convert_type(bits, like.dtype)


def measure(product: Product, name: str, *, label: str, tokens: int, weight: Any, repeats: int = 10) -> dict[str, Any]:
    """One line of results, for x [tokens, K]."""
    layers, n, k = weight.shape
    x = jax.random.normal(jax.random.key(1), (tokens, k), jnp.bfloat16)

    def every_layer(x: jax.Array, weight: Any) -> list[jax.Array]:
        if isinstance(weight, tuple):
            return [product(x, own, None) for own in weight]
        return [product(x, weight, jnp.int32(layer)) for layer in range(layers)]

    # of an array XLA would copy each layer out of the stack
    operand = tuple(weight) if isinstance(weight, jax.Array) else weight
    seconds = seconds_per_call(every_layer, (x, operand), calls=layers, repeats=repeats)
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

    def product(x: jax.Array, weight: Any, layer: Any) -> jax.Array:
        walk = walk_of(weight, x.dtype, backend)
        assert walk is not None
        tiles = tiles_for(rows=x.shape[0], n=weight.shape[-2], steps=walk.steps, device_kind=backend.device_kind)
        return quant_matmul_triton(x, weight, walk=walk, layer=layer, tiles=tiles, interpret=backend.interpret)

    return product


def chosen_product(backend: Backend) -> Product:
    """What an engine computes, rounding of x included; of an array, the product of its own type."""

    def product(x: jax.Array, weight: Any, layer: Any) -> jax.Array:
        if not isinstance(weight, jax.Array):
            return quant_matmul(x, weight, backend=backend, layer=layer)
        return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32).astype(x.dtype)

    return product


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    if arguments.device == "interpret-smoke":
        backend = Backend(implementation="triton", interpret=True)
        weight = random_weight(INT4[128], 64, 256, 2)
        report(
            [measure(kernel_product(backend), "triton", label="smoke", tokens=4, weight=weight, repeats=1)],
            arguments.json,
        )
        return
    backend = device_backend(jax.devices("gpu")[0])
    ways = {"triton": kernel_product(backend), "xla": chosen_product(Backend(implementation="xla"))}
    results = []
    for model, _, projections in MODELS:
        for projection, n, k in projections:
            weight = random_weight(INT4[128], n, k, max(4, 2 * WEIGHT_BYTES // (n * k)))
            for tokens in (*TOKENS, 512):
                label = f"{model} {projection}, {tokens} tokens"
                results += [measure(way, name, label=label, tokens=tokens, weight=weight) for name, way in ways.items()]
    for name, form in {"bfloat16": None, **FORMS}.items():
        weight = random_weight(form, 28672, 4096, 16)
        for tokens in TOKENS:
            label = f"Llama-3.1-8B gate_up, {tokens} tokens"
            results.append(measure(chosen_product(backend), name, label=label, tokens=tokens, weight=weight))
    report(results, arguments.json)


if __name__ == "__main__":
    main()
