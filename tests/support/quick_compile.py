"""How tests compile: quickly. What they compile runs for moments, and compiling it is most of what they cost."""

from __future__ import annotations

import importlib.metadata

#: Of XLA on a CPU: without LLVM's optimisations and, where JAX still has it, by the older code generator. Together they
#: take a third of the processor time. What a program computes is decided before, and is the same.
QUICK: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
#: what XLA does by itself, for what users' programs are measured by, or for numbers that are compared bit for bit
THOROUGH: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
if tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False
    THOROUGH["xla_cpu_use_fusion_emitters"] = True
#: the same for the processes of the tests and those that they start
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())


def quick_flags(given: str) -> str:
    """`XLA_FLAGS` of such a process; what is given there already wins."""
    return given if FLAGS in given else f"{FLAGS} {given}".strip()


def thorough_flags(given: str) -> str:
    """`XLA_FLAGS` of a process that compiles as users do."""
    return given.replace(FLAGS, "").strip()
