"""vLLM's `CompilationConfig`: its scripts may make one, and the engine says that it has no effect."""

from __future__ import annotations

import enum
from typing import Any


class CompilationMode(enum.IntEnum):
    """vLLM's levels of torch.compile."""

    NONE = 0
    STOCK_TORCH_COMPILE = 1
    DYNAMO_TRACE_ONCE = 2
    VLLM_COMPILE = 3


class CUDAGraphMode(enum.Enum):
    """vLLM's ways to record CUDA graphs."""

    NONE = 0
    PIECEWISE = 1
    FULL = 2
    FULL_DECODE_ONLY = (2, 0)
    FULL_AND_PIECEWISE = (2, 1)


class CompilationConfig:
    """Takes vLLM's fields, whatever they are. XLA compiles every step, for the shapes of its own buckets."""

    def __init__(self, mode: CompilationMode | int | None = None, **fields: Any):
        self.mode = mode
        vars(self).update(fields)

    def __repr__(self) -> str:
        return f"CompilationConfig({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"
