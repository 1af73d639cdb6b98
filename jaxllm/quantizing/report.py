"""What quantizing a model did: how far the products of each matrix are off, bytes, and perplexity."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixError:
    """Of one matrix: the root of the mean square of what its products are off, relative to the products."""

    layer: int
    #: in the layer, ``mlp.down_proj``; of experts all together
    matrix: str
    error: float
    #: of rounding to the nearest number of the same kind
    nearest: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """What `jaxllm.quantize` returns; printed, a table."""

    output: Path
    method: str
    errors: tuple[MatrixError, ...]
    #: whether the errors are of products with inputs from text; False: of the matrices themselves
    of_products: bool
    #: of the weights as the checkpoint's tensors are, in 16 or 32 bits, and as they are written
    bytes_before: int
    bytes_after: int
    #: on text that calibration did not see; None: not measured
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    perplexity_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**dataclasses.asdict(self), "output": str(self.output)}

    def __str__(self) -> str:
        what = "products are off" if self.of_products else "matrices are off"
        # where all is rounded to the nearest there is nothing to compare with
        compares = any(error.error != error.nearest for error in self.errors)
        beside = " (in parentheses: rounded to the nearest)" if compares else ""
        lines = [f"How far {what}{beside}, relative, root mean square:", ""]
        names = list(dict.fromkeys(error.matrix for error in self.errors))
        cells = {
            (error.layer, error.matrix): f"{error.error:.2%}" + (f" ({error.nearest:.2%})" if compares else "")
            for error in self.errors
        }
        short = [name.removeprefix("self_attn.").removeprefix("mlp.").removesuffix("_proj") for name in names]
        width = max([len(cell) for cell in [*cells.values(), *short]], default=0) + 2
        lines.append("layer" + "".join(f"{name:>{width}}" for name in short))
        for layer in dict.fromkeys(error.layer for error in self.errors):
            lines.append(f"{layer:>5}" + "".join(f"{cells.get((layer, name), ''):>{width}}" for name in names))
        lines += ["", f"weights     {self.bytes_before / 2**20:,.1f} MiB -> {self.bytes_after / 2**20:,.1f} MiB"]
        if self.perplexity_before is not None and self.perplexity_after is not None:
            ratio = self.perplexity_after / self.perplexity_before
            lines.append(
                f"perplexity  {self.perplexity_before:.3f} -> {self.perplexity_after:.3f} ({ratio:.3f} times), "
                f"{self.perplexity_tokens} tokens of text that calibration did not see"
            )
        return "\n".join([*lines, f"written to  {self.output}"])
