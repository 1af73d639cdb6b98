"""Activations of gated products, as LLVM code."""

from __future__ import annotations

import math

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import LANES, Code, Value


def _silu(code: Code, x: Value) -> Value:
    """``x / (1 + exp(-x))`` (Elfwing et al. 2017, arXiv:1702.03118)."""
    return _by_sigmoid(code, x, code.multiplied(x, ir.Constant(x.type, [-0.5] * LANES)))


def _gelu(code: Code, x: Value) -> Value:
    """``x (1 + tanh(z)) / 2 = x / (1 + exp(-2 z))``, ``z = sqrt(2 / pi) (x + 0.044715 x^3)`` (Hendrycks and Gimpel
    2016, arXiv:1606.08415).
    """
    of = lambda value: ir.Constant(x.type, [value] * LANES)  # noqa: E731
    factor = math.sqrt(2 / math.pi)
    slope = code.multiply_add(code.multiplied(x, x), of(-0.044715 * factor), of(-factor))
    return _by_sigmoid(code, x, code.multiplied(x, slope))


def _by_sigmoid(code: Code, x: Value, half_power: Value) -> Value:
    """``x / (1 + exp(half_power) ** 2)``. `Code.exp` ends at 2 ** 127, by which a large x is no zero; its square is
    infinite, as the power of a negative x is in float32.
    """
    root = code.exp(half_power)
    return code.builder.fdiv(x, code.multiply_add(root, root, ir.Constant(x.type, [1.0] * LANES)))


#: by the names that kernels have
ACTIVATIONS = {"silu": _silu, "gelu": _gelu}
