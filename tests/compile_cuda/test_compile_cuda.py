"""Compiled for real GPUs, without one: every kernel's configurations, and whole steps of real models.

`make compile-cuda` installs JAX's CUDA compiler, for each JAX that the package works with, into a folder of its own: a
plugin without a GPU beside every other test would be in their way.
"""

from __future__ import annotations

import collections
import concurrent.futures
import re
from collections.abc import Iterator
from typing import Any

import pytest

from . import stated
from .compiling import QUICK, TARGETS, Results, compile_for, toolchains
from .quantized_models import SMALLEST_MATRIX

Compiled = dict[tuple[str, str], Results]
#: for which the reading of machine code is tried; in a quick run for one
PROBED = list(TARGETS)[1:2] if QUICK else list(TARGETS)

#: stack that kernels may have, by a pattern of "case, kernel", and why: bytes of each thread
STACKS: dict[str, int] = {
    # heads of 256 numbers, widened from one byte: the registers of sm_100 do not hold both tiles
    r"^paged_attention: Gemma.* over (int8|float8)": 128,
    # latents of 576 numbers, widened from one byte
    r"^paged_latent_attention: .* over (int8|float8)": 32,
    # up to four numbers, of one token's products with a matrix of 1,536 columns
    r"^lora_matmul: ": 16,
    # XLA's own products, whose tiles it chooses on the card: without one nothing is autotuned
    r"^Gemma-3-27B: (decode|mixed) .*, fusion\.\d+$": 696,
    # and of routers
    r"^Qwen3-30B-A3B in GPTQ: decode .*, fusion\.\d+$": 32,
    # a few numbers of a tile of 128 x 128 bytes, widened, on sm_80
    r"^grouped_matmul: .*, (int8|fp8)( in groups of 128)?, 2048 tokens": 32,
    # up to four numbers, outside of the loop over the context or for heads of 256
    r"^paged_attention: ": 16,
}


def each(compiled: Compiled) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(JAX, target, case, result) of what compiled."""
    for (jax, target), found in compiled.items():
        for name, result in found.items():
            if "error" not in result:
                yield jax, target, name, result


def test_everything_compiles(compiled: Compiled):
    failed = [
        f"JAX {jax}, {target}, {name}: {result['error']}"
        for (jax, target), found in compiled.items()
        for name, result in found.items()
        if "error" in result
    ]
    assert not failed, "\n".join(failed)
    kinds: collections.defaultdict[str, set[str]] = collections.defaultdict(set)
    for jax, target, name, result in each(compiled):
        if result["is_step"]:
            for key in (jax, target):
                kinds[key].add(name.split(": ")[1].split()[0])
    assert kinds.keys() == {part for key in compiled for part in key}
    assert all({"decode", "mixed", "sample", "pool"} <= found for found in kinds.values()), kinds


def test_kernels_fit_into_a_multiprocessor(compiled: Compiled):
    """Shared memory of a block, and registers of all its threads; a launch that asks for more fails."""
    problems = []
    for jax, target, name, result in each(compiled):
        gpu = TARGETS[target]
        for kernel in result["kernels"]:
            shown = f"JAX {jax}, {target}, {name}, {kernel['name']}"
            if kernel["registers"] is None:
                problems.append(f"{shown}: its machine code was not found")
                continue
            if kernel["shared"] > gpu.shared_memory_per_block_optin:
                problems.append(f"{shown}: {kernel['shared']} bytes of shared memory")
            # registers are given to whole warps, eight for each thread at a time
            threads = -(-kernel["threads"] // 32) * 32
            if threads * -(-kernel["registers"] // 8) * 8 > gpu.registers_per_sm:
                problems.append(f"{shown}: {kernel['registers']} registers of each of {kernel['threads']} threads")
    assert not problems, "\n".join(problems)


def test_no_register_is_spilled(compiled: Compiled):
    problems = []
    for jax, target, name, result in each(compiled):
        for kernel in result["kernels"]:
            where = f"{name}, {kernel['name']}"
            most = next((stack for pattern, stack in STACKS.items() if re.search(pattern, where)), 0)
            if (kernel["stack"] or 0) > most:
                problems.append(f"JAX {jax}, {target}, {where}: a stack of {kernel['stack']} bytes")
    assert not problems, "\n".join(problems)


def test_everything_donated_is_written_in_place(compiled: Compiled):
    """The KV cache and the tokens are never copied."""
    problems = [
        f"JAX {jax}, {target}, {name}: {result['alias']} bytes in place of {result['in_place']}"
        for jax, target, name, result in each(compiled)
        if result["alias"] != result["in_place"]
    ]
    assert not problems, "\n".join(problems)


def test_weights_are_not_copied(compiled: Compiled):
    """Not even those of one layer: a step takes as long as its weights take to be read."""
    problems = []
    for jax, target, name, result in each(compiled):
        copied, least = result["launches"]["copied"], min(result["layer_bytes"], default=0)
        if result["layers"] and copied >= least:
            problems.append(f"JAX {jax}, {target}, {name}: {copied} bytes copied, a layer has {least}")
    assert not problems, "\n".join(problems)


def test_temporaries(compiled: Compiled):
    problems = []
    for jax, target, name, result in each(compiled):
        temporaries, most = result["temporaries"], result["most_temporaries"]
        if most is not None and temporaries > most:
            problems.append(f"JAX {jax}, {target}, {name}: {temporaries} bytes of temporaries, at most {most}")
        if result["cache"] and temporaries >= result["cache"]:
            problems.append(f"JAX {jax}, {target}, {name}: temporaries of {temporaries} bytes may hold the KV cache")
    assert not problems, "\n".join(problems)


def test_no_step_widens_a_quantized_matrix(compiled: Compiled):
    """Kernels read quantized weights as they lie, of attention, of MLPs and of experts."""
    seen = set()
    for jax, target, name, result in each(compiled):
        model = name.partition(": ")[0]
        if model in SMALLEST_MATRIX:
            seen.add(model)
            assert result["temporaries"] < SMALLEST_MATRIX[model], (jax, target, name, result["temporaries"])
    assert seen == set(SMALLEST_MATRIX)


def test_temporaries_do_not_grow_with_the_cache(compiled: Compiled):
    compared = 0
    for jax, target, name, result in each(compiled):
        same = re.sub(r", \d+ blocks$", "", name)
        if same != name:
            assert result["temporaries"] == compiled[jax, target][same]["temporaries"], (jax, target, name)
            compared += 1
    assert compared


@pytest.mark.skipif(QUICK, reason="a quick run has no such steps")
def test_layers_in_the_hosts_memory_come_ahead_of_their_use(compiled: Compiled):
    """Two layers at most are on the device, and most of what is copied is on its way while others are computed."""
    seen = 0
    for jax, target, name, result in each(compiled):
        if not result["fetched"]:
            continue
        seen += 1
        where = f"JAX {jax}, {target}, {name}"
        plain = compiled[jax, target][name.replace(", half on the host", "")]
        assert result["host_arguments"] == sum(result["layer_bytes"]) // 2, where
        assert result["arguments"] == plain["arguments"] - result["host_arguments"], where
        assert result["temporaries"] <= plain["temporaries"] + result["fetched"] + 2**22, where
        copies = result["overlaps"]
        assert sum(launched > 0 for launched in copies) >= result["layers"] // 2, f"{where}: {copies}"
    assert seen


def test_nothing_exceeds_its_stated_number(compiled: Compiled):
    """Launches, copied bytes and temporaries of each program, as `stated.json` has them."""
    problems = [
        f"JAX {jax}, {target}, {problem}"
        for (jax, target), found in compiled.items()
        for problem in stated.excesses(jax, target, found)
    ]
    assert not problems, "\n".join(problems)


@pytest.fixture(scope="module")
def probed() -> Compiled:
    """Kernels of which it is known what they need; two processes at once."""
    pairs = [(toolchain, target) for toolchain in toolchains() for target in PROBED]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda pair: compile_for(*pair, only="probe"), pairs)
        return {(toolchain.jax, target): results for (toolchain, target), results in zip(pairs, found, strict=True)}


@pytest.mark.parametrize("target", PROBED)
@pytest.mark.parametrize("jax", [toolchain.jax for toolchain in toolchains()])
def test_the_reading_of_machine_code(probed: Compiled, jax: str, target: str):
    """What is asserted above would be seen: kernels whose registers and shared memory are known by construction."""
    found = probed[jax, target]
    (kernel,) = found["probe: 64 values of each thread"]["kernels"]
    assert 64 <= kernel["registers"] < 255 and kernel["stack"] == 0 and kernel["threads"] == 128
    (kernel,) = found["probe: 256 values of each thread"]["kernels"]
    assert kernel["stack"] > 0
    assert found["probe: 512 KiB of shared memory"]["error"].startswith("JaxRuntimeError")
    assert "hared memory" in found["probe: 512 KiB of shared memory"]["error"]
    assert found["probe: ends its process"]["error"].startswith("ended its process with -6")
    assert found["probe: the last"]["launches"]["number"] == 1
