"""How tests compile: quickly. What they compile runs for moments, and compiling it is most of what they cost.

These are options of XLA on a CPU, about machine code; what a program computes is decided before, and stays the same.
"""

from __future__ import annotations

import importlib.metadata

Options = dict[str, int | bool]

#: without LLVM's optimisations, in one part instead of 32, and, where JAX has it, by the older code generator: a
#: fourth of the processor time. On processors with AVX512-BF16 such programs lose so much of bfloat16 that a real model
#: talks nonsense; with any of these options left out it does not
QUICK: Options = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
#: for real weights, and whatever else runs for long: two thirds of the time for nearly the same programs
FOR_LONG_RUNS: Options = {"xla_backend_optimization_level": 3}
#: as users do, for what their programs promise bit for bit, and for what compiling takes
THOROUGH: Options = {"xla_backend_optimization_level": 3}
if tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = FOR_LONG_RUNS["xla_cpu_use_fusion_emitters"] = False
    THOROUGH["xla_cpu_use_fusion_emitters"] = True


def flags(options: Options, given: str) -> str:
    """`XLA_FLAGS` of a process that compiles so, besides what is given there."""
    others = [flag for flag in given.split() if flag.removeprefix("--").partition("=")[0] not in options]
    return " ".join([*others, *(f"--{name}={str(value).lower()}" for name, value in options.items())])
