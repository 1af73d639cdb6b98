"""Compiles every case for one GPU that is not there, in a process of its own: a compiler for another target may abort
it, and JAX takes its platforms from the environment.

    PYTHONPATH=tests python -m compile_cuda.worker sm_90 [--quick] [--part 0 or 1] [--only TEXT] [--skip NAME ...]

Output: a line of JSON when a case begins, another when it has ended, `read` by `compiling.py`.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import time
from typing import Any

import jax

from jaxllm.parallel.collectives import collectives
from jaxllm.parallel.mesh import make_mesh
from jaxllm.runner.compile.compiler_options import GPU_COPY_OPTIONS, GPU_OPTIONS
from jaxllm.runner.compile.deviceless import devices, lowering_for

from .cases import Case, kernel_cases, latent_pool_cases, pool_cases
from .compiling import TARGETS
from .executable import Launch, read_executable
from .probes import probe_cases
from .steps import quantized_cases, split_cases, step_cases


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", type=int, choices=(0, 1))
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", action="append", default=[])
    options = parser.parse_args()
    gpu = TARGETS[options.target]
    device = devices(gpu)[0]
    if options.only == "probe":
        groups = [probe_cases(device)]
    else:
        makers = (kernel_cases, pool_cases, latent_pool_cases, step_cases, quantized_cases, split_cases)
        groups = [make(device, gpu, options.quick, options.part) for make in makers]
    for cases in groups:
        for case in cases:
            if options.only in case.name and case.name not in options.skip:
                tell(case=case.name, begins=True)
                try:
                    tell(case=case.name, **compile_case(case, device))
                except Exception as error:  # the next case may do better
                    tell(case=case.name, error=f"{type(error).__name__}: {str(error)[:2000]}")


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def compile_case(case: Case, device: Any) -> dict[str, Any]:
    begun = time.perf_counter()
    with lowering_for(make_mesh(case.devices or (device,))):
        lowered = case.lower()
    options = {**GPU_OPTIONS, **(GPU_COPY_OPTIONS if case.fetched_bytes else {})}
    compiled = lowered.compile(compiler_options=options if case.is_step else None)
    seconds = time.perf_counter() - begun
    memory: Any = compiled.memory_analysis()
    program = read_executable(compiled.runtime_executable().serialize())  # pyright: ignore
    return {
        "is_step": case.is_step,
        "seconds": seconds,
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
        "in_place": case.in_place_bytes,
        "cache": case.cache_bytes,
        "most_temporaries": case.most_temporary_bytes,
        "kernels": [describe(launch) for launch in program if launch.kind == "kernel" or launch.code],
        "layers": case.layers,
        "layer_bytes": case.layer_bytes,
        "weight_bytes": case.weight_bytes,
        "fetched": case.fetched_bytes,
        "host_arguments": memory.host_argument_size_in_bytes,
        "overlaps": overlaps(compiled.as_text() or "") if case.fetched_bytes else [],
        "collectives": exchanges(compiled) if len(case.devices) > 1 else [],
        "launches": count(program),
    }


def describe(launch: Launch) -> dict[str, Any]:
    code = launch.code
    return {
        "name": launch.name,
        "threads": launch.threads_per_block,
        "shared": launch.shared,
        "registers": code.registers if code else None,
        "stack": code.stack if code else None,
    }


def exchanges(compiled: Any) -> list[tuple[str, str, int, int, int]]:
    """(kind, logical axis, devices, bytes that each gets, times) of each collective of a program."""
    found = collectives(compiled.as_text())
    return sorted((each.kind, each.over, each.devices, each.bytes, times) for each, times in found.items())


def overlaps(text: str) -> list[int]:
    """Of each copy from the host, the products and kernels that are launched between its beginning and its end."""
    begun: dict[str, int] = {}
    found, launched = [], 0
    for line in text.splitlines():
        if match := re.search(r"%(\S+) = .* copy-start\(.*", line):
            begun[match[1]] = launched
        elif match := re.search(r" copy-done\(%(\S+)\)", line):
            found.append(launched - begun.pop(match[1]))
        elif re.search(r" custom-call\(|gemm_fusion\S* = | fusion\(.*kind=kCustom", line):
            launched += 1
    return found


def count(program: tuple[Launch, ...]) -> dict[str, Any]:
    """Launches; bytes that they copy; and of what kind they are."""
    return {
        "number": len(program),
        "copied": sum(launch.copied_bytes for launch in program),
        "kinds": dict(collections.Counter(launch.kind for launch in program)),
    }


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    main()
