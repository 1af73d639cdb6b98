"""``python -m pallas_kernels.lora_matmul.bench [--device gpu|cpu|interpret-smoke] [--json FILE]``

Times every implementation at the shapes of `configurations`, tokens drawn evenly over the slots. GB/s counts what must
be read and written at least: the slots' matrices, x and the result.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backend import Backend, device_backend
from pallas_kernels.lora_matmul.api import ADAPTERS, MODELS, TOKENS, lora_matmul
from pallas_kernels.timing import parse_arguments, report, seconds_per_call


def measure(
    backend: Backend,
    *,
    label: str,
    tokens: int,
    columns: int,
    parts: tuple[int, ...],
    slots: int,
    rank: int,
    layers: int,
    dtype: Any = jnp.bfloat16,
    repeats: int = 10,
) -> dict[str, Any]:
    """One line of results; x is bfloat16, adapters are of ``dtype``."""
    keys, draw = jax.random.split(jax.random.key(0), 3), np.random.default_rng(0)
    x = jax.random.normal(keys[0], (tokens, columns), jnp.bfloat16)
    a = jax.random.normal(keys[1], (layers, slots, len(parts) * rank, columns), dtype)
    b = jax.random.normal(keys[2], (layers, slots, rank, sum(parts)), dtype)
    owners = jnp.asarray(draw.integers(slots, size=tokens), jnp.int32)

    def every_layer(x: jax.Array, a: jax.Array, b: jax.Array, owners: jax.Array) -> list[jax.Array]:
        return [
            lora_matmul(x, a, b, owners, backend=backend, parts=parts, layer=jnp.int32(layer))
            for layer in range(layers)
        ]

    seconds = seconds_per_call(every_layer, (x, a, b, owners), calls=layers, repeats=repeats)
    used = len(np.unique(owners)) / slots
    moved = used * (a.nbytes + b.nbytes) / layers + x.nbytes + 4 * tokens * sum(parts)
    return {
        "label": label,
        "implementation": backend.implementation,
        "us": seconds * 1e6,
        "GB/s": moved / seconds / 1e9,
    }


def main() -> None:
    arguments = parse_arguments(__doc__ or "", ("gpu", "cpu", "interpret-smoke"))
    if arguments.device == "interpret-smoke":
        shape: dict[str, Any] = {"tokens": 8, "columns": 64, "parts": (32, 16), "slots": 2, "rank": 4, "layers": 2}
        backend = Backend(implementation="triton", interpret=True)
        report([measure(backend, label="smoke", repeats=1, **shape)], arguments.json)
        return
    backends = [Backend(implementation="xla")]
    if arguments.device == "gpu":
        backends.insert(0, device_backend(jax.devices("gpu")[0]))
    results = []
    for model, layers, projections in MODELS:
        for projection, columns, parts in projections:
            for slots, rank in ADAPTERS:
                for tokens in TOKENS:
                    label = f"{model} {projection}, {slots} slots of rank {rank}, {tokens} tokens"
                    shape = {"tokens": tokens, "columns": columns, "parts": parts, "slots": slots, "rank": rank}
                    dtype = jnp.float32 if arguments.device == "cpu" else jnp.bfloat16
                    results += [measure(each, label=label, layers=layers, dtype=dtype, **shape) for each in backends]
    report(results, arguments.json)


if __name__ == "__main__":
    main()
