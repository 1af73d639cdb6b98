"""What an engine compiles the kernel for, at the shapes of real models."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Backend
from pallas_kernels.case import KernelCase
from pallas_kernels.quant_matmul.layout import Int4Weight
from pallas_kernels.quant_matmul.tiles import tiles_for
from pallas_kernels.quant_matmul.walk import walk_of
from pallas_kernels.quantized import CodebookWeight, RoundedInputs, ScaledWeight

#: (model, layers, ((projection, out, in), ...))
MODELS = (
    (
        "Llama-3.1-8B",
        32,
        (("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336)),
    ),
    (
        "Qwen2.5-7B",
        28,
        (("qkv", 4608, 3584), ("o", 3584, 3584), ("gate_up", 37888, 3584), ("down", 3584, 18944)),
    ),
)
#: every entry of `tuned.json` is chosen by one of them
TOKENS = (1, 16, 32, 64, 256, 2048)
#: of the forms that are compiled at one shape
FEW_TOKENS = (1, 64, 256, 2048)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How a checkpoint has its matrices."""

    name: str
    #: of the numbers: "int4", "codebook", "int8" or "float8_e4m3fn"
    stored: str
    #: numbers of K with one scale; 0: all
    group: int = 0
    scales: str = "float32"
    #: whether inputs are in eight bits, too, in groups of as many; 0: a token has one scale
    x_group: int | None = None

    def shapes(self, n: int, k: int, *stack: int) -> Any:
        """A stack of weights [*stack, N, K], of `jax.ShapeDtypeStruct`."""

        def array(dtype: str, *shape: int) -> Any:
            return jax.ShapeDtypeStruct((*stack, *shape), jnp.dtype(dtype))

        groups = k // (self.group or k)
        if self.stored == "int4":
            scales, zeros = (array(dtype, groups, n) for dtype in (self.scales, "uint8"))
            return Int4Weight(packed=array("uint8", n, k // 2), scales=scales, zeros=zeros)
        scales = array(self.scales, n, groups)
        if self.stored == "codebook":
            return CodebookWeight(packed=array("uint8", n, k // 2), scales=scales, table=tuple(map(float, range(16))))
        weight = ScaledWeight(values=array(self.stored, n, k), scales=scales)
        return weight if self.x_group is None else RoundedInputs(weight=weight, dtype=self.stored, group=self.x_group)

    def temporary_bytes(self, rows: int, k: int) -> int:
        """Of a product of x [rows, K]: x in eight bits, or the same numbers in its own type, and their scales; or a
        codebook's numbers. With what memory is aligned to."""
        if self.x_group is None:
            return 64 if self.stored == "codebook" else 0
        return rows * (2 * k + 4 * k // (self.x_group or k)) + 256


INT4 = {
    group: Form(name=f"int4 in groups of {group}", stored="int4", group=group, scales="float16")
    for group in (128, 64, 32)
}
FORMS = {
    form.name: form
    for form in (
        *INT4.values(),
        Form(name="int8", stored="int8"),
        Form(name="int8 in groups of 128", stored="int8", group=128, scales="float16"),
        Form(name="int8 by int8", stored="int8", x_group=0),
        Form(name="fp8", stored="float8_e4m3fn"),
        Form(name="fp8 by fp8", stored="float8_e4m3fn", x_group=0),
        Form(name="fp8 in blocks of 128 by fp8", stored="float8_e4m3fn", group=128, x_group=128),
        Form(name="nf4", stored="codebook", group=64),
        Form(name="mxfp4", stored="codebook", group=32, scales="uint8"),
    )
}


def configurations(device_kind: str = "", compute_capability: tuple[int, int] | None = None) -> list[KernelCase]:
    """The kernel where it is chosen: four bits in groups of 128 at the shapes of `MODELS`, the other forms at one.

    No case may need the memory of an unpacked weight: all temporaries are the float32 parts of a split K.
    """
    from pallas_kernels.quant_matmul.api import implementation_for, quant_matmul

    backend = Backend(implementation="triton", device_kind=device_kind, compute_capability=compute_capability)

    def product(x: jax.Array, weight: Any, layer: jax.Array) -> jax.Array:
        return quant_matmul(x, weight, backend=backend, layer=layer)

    def case(model: str, layers: int, projection: str, n: int, k: int, form: Form, tokens: int) -> KernelCase | None:
        weight, dtype = form.shapes(n, k, layers), jnp.dtype(jnp.bfloat16)
        if implementation_for(backend, weight, rows=tokens, dtype=dtype) != "triton":
            return None
        walk = walk_of(weight, dtype, backend)
        assert walk is not None
        split = tiles_for(rows=tokens, n=n, steps=walk.steps, device_kind=device_kind).split_k
        return KernelCase(
            operation="quant_matmul",
            label=f"{model} {projection}, {form.name}, {tokens} tokens",
            function=product,
            arguments=(jax.ShapeDtypeStruct((tokens, k), dtype), weight, jax.ShapeDtypeStruct((), jnp.int32)),
            max_temporary_bytes=(split * tokens * n * 4 if split > 1 else 0) + form.temporary_bytes(tokens, k),
        )

    llama, layers, projections = MODELS[0]
    wanted = [(*model, INT4[128], TOKENS) for model in MODELS]
    wanted += [(llama, layers, projections[:1], INT4[group], TOKENS) for group in (64, 32)]
    wanted += [(llama, layers, projections[-1:], form, FEW_TOKENS) for form in FORMS.values() if form.stored != "int4"]
    cases = [
        case(model, layers, projection, n, k, form, tokens)
        for model, layers, projections, form, every in wanted
        for projection, n, k in projections
        for tokens in every
    ]
    return [case for case in cases if case is not None]
