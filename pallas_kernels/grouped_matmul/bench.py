"""``python -m pallas_kernels.grouped_matmul.bench [--device gpu|interpret-smoke] [--json FILE]``

Times every implementation at the shapes of `configurations`, tokens drawn evenly over the experts, and the kernel with
quantized weights at one. GB/s counts what must be read and written at least: the weights of experts with tokens as they
are stored, x and the result. TFLOP/s counts two per product.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backend import Backend, device_backend
from pallas_kernels.grouped_matmul.api import MODELS, TOKENS, grouped_matmul
from pallas_kernels.quant_matmul.bench import random_weight
from pallas_kernels.quant_matmul.configurations import FORMS, Form
from pallas_kernels.timing import parse_arguments, report, seconds_per_call

#: bytes of weights that the timed calls go through in turn: more than any cache holds
WEIGHT_BYTES = 4 * 2**30


def measure(
    backend: Backend,
    *,
    label: str,
    tokens: int,
    active: int,
    experts: int,
    n: int,
    k: int,
    layers: int,
    form: Form | None = None,
    repeats: int = 10,
) -> dict[str, Any]:
    """One line of results. tokens of ``active`` experts each; weights [layers, experts, n, k] in bfloat16, or of a form
    of `quant_matmul.configurations`."""
    rows = tokens * active
    draw = np.random.default_rng(0)
    owners = np.concatenate([draw.choice(experts, active, replace=False) for _ in range(tokens)])
    sizes = np.bincount(owners, minlength=experts)
    x = jax.random.normal(jax.random.key(1), (rows, k), jnp.bfloat16)
    w = random_weight(form, n, k, layers, experts)

    def every_layer(x: jax.Array, w: Any, group_sizes: jax.Array) -> list[jax.Array]:
        return [grouped_matmul(x, w, group_sizes, backend=backend, layer=jnp.int32(layer)) for layer in range(layers)]

    seconds = seconds_per_call(every_layer, (x, w, jnp.asarray(sizes, jnp.int32)), calls=layers, repeats=repeats)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(w)) / (layers * experts)
    moved = int((sizes > 0).sum()) * stored + 2 * rows * (n + k)
    return {
        "label": label,
        "implementation": backend.implementation,
        "us": seconds * 1e6,
        "GB/s": moved / seconds / 1e9,
        "TFLOP/s": 2 * rows * n * k / seconds / 1e12,
    }


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    if arguments.device == "interpret-smoke":
        backend = Backend(implementation="triton", interpret=True)
        shape: dict[str, Any] = {"tokens": 8, "active": 2, "experts": 4, "n": 64, "k": 64, "layers": 2}
        report([measure(backend, label="smoke", repeats=1, **shape)], arguments.json)
        return
    kernel = device_backend(jax.devices("gpu")[0])
    results = []
    for model, active, _, experts, projections in MODELS:
        for projection, n, k in projections:
            layers = max(2, WEIGHT_BYTES // (2 * experts * n * k))
            for tokens in TOKENS:
                shape = {"tokens": tokens, "active": active, "experts": experts, "n": n, "k": k, "layers": layers}
                label = f"{model} {projection}, {tokens} tokens"
                results.append(measure(kernel, label=label, **shape))
                results.append(measure(Backend(implementation="xla"), label=label, **shape))
    for name, form in FORMS.items():
        shape = {"active": 8, "experts": 128, "n": 1536, "k": 2048, "layers": 8, "form": form}
        for tokens in TOKENS:
            results.append(
                measure(kernel, label=f"Qwen3-30B-A3B gate_up, {name}, {tokens} tokens", tokens=tokens, **shape)
            )
    report(results, arguments.json)


if __name__ == "__main__":
    main()
