"""Kernels for CPUs in programs: kept and found by another process, split over devices, chosen by an engine."""

from __future__ import annotations

import ast
import concurrent.futures
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import quantized_checkpoints
from support.latent_cache import DEEPSEEK
from support.tiny_model import CONFIG, SMALL, write_tiny_model

from jaxllm.config.engine_args import EngineArgs
from jaxllm.layers.stacked_matrix import StackedMatrix
from jaxllm.models.params import MATRICES
from jaxllm.runner.compile.cpu_kernels import with_cpu_kernels
from jaxllm.runner.compile.target import target_here
from jaxllm.runner.heads.weight_forms import with_whole_layers
from jaxllm.startup.setup import read_setup
from pallas_kernels.cpu_ffi import untouched
from pallas_kernels.cpu_ffi.compiled import Kernels, finish, later, target_name
from pallas_kernels.dense_matmul import kernel as dense_kernel
from pallas_kernels.packed_matmul import cpu_ffi
from pallas_kernels.paged_attention.cpu_ffi import kernel_for
from pallas_kernels.quant_matmul import cpu_ffi as int8
from pallas_kernels.quantized import RoundedInputs, is_quantized

#: a program over four devices, each with a part of the rows of a weight, launched from several threads
PROGRAM = """
    import concurrent.futures, sys
    from pathlib import Path
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from jaxllm.runner.compile.compiler_options import CPU_OPTIONS
    from jaxllm.runner.compile.store import open_store
    from pallas_kernels.backend import Backend
    from pallas_kernels.packed_matmul.api import packed_matmul
    from pallas_kernels.packed_matmul.cpu_ffi import load
    from pallas_kernels.quantized import ScaledWeight

    folder, devices = Path(sys.argv[1]), jax.devices()
    assert len(devices) == 4
    mesh = jax.make_mesh((4,), ("tensor",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    draw = np.random.default_rng(0)
    weight = ScaledWeight(
        values=jnp.asarray(draw.integers(-128, 128, (2, 64, 96)), jnp.int8), scales=jnp.ones((2, 64, 1))
    )
    x = jnp.asarray(draw.normal(size=(3, 96)), jnp.bfloat16)
    backend = Backend(cpu_kernels=load([weight], x.dtype, folder / "kernels"))
    assert backend.cpu_kernels

    def product(x, weight, layer):
        return packed_matmul(x, weight, backend=backend, layer=layer)

    split = jax.shard_map(product, mesh=mesh, in_specs=(P(), P(None, "tensor"), P()), out_specs=P(None, "tensor"))
    placed = [
        jax.device_put(tree, NamedSharding(mesh, spec))
        for tree, spec in ((x, P()), (weight, P(None, "tensor")), (jnp.int32(1), P()))
    ]
    store = open_store(folder / "programs", devices, CPU_OPTIONS, backend)
    program = store.find(("product",))
    print("found" if program else "compiled", end=" ")
    program = program or store.compile(("product",), jax.jit(split).lower(*placed))
    exact = np.asarray(x, np.float64) @ np.asarray(weight.values[1], np.float64).T
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: [np.asarray(program(*placed)) for _ in range(20)], range(4)):
            assert all(np.abs(each - exact).max() < 1e-3 * np.abs(exact).max() for each in y)
    print("right")
"""


def test_programs_are_found_and_split_over_devices(tmp_path: Path):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # which would keep programs in the store's place
    for expected in ("compiled right", "found right"):
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == expected


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_an_engine_has_the_kernels_of_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    args = EngineArgs(model=write_tiny_model(tmp_path), quantization=quantization, **SMALL)

    def config_of(args: EngineArgs) -> Any:
        return read_setup(args, Path(args.model)).runner_config(target_here("cpu"), progress=None)

    config = config_of(args)
    params = with_whole_layers(config.params(), config.backend, one_row=False)
    leaves = jax.tree.leaves(params.layers, is_leaf=lambda leaf: isinstance(leaf, StackedMatrix))
    whole = [leaf for leaf in leaves if isinstance(leaf, StackedMatrix)]
    assert config.backend.cpu_kernels and whole and all(is_quantized(leaf.stored) for leaf in whole)
    assert not config_of(dataclasses.replace(args, deterministic=True)).backend.cpu_kernels
    assert not config_of(dataclasses.replace(args, quantization=None)).backend.cpu_kernels


@pytest.mark.skipif(not int8.forms(), reason="the processor has no products of bytes")
@pytest.mark.parametrize("deterministic", [False, True])
def test_an_engine_has_the_kernels_of_its_rounded_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
):
    """All programs read the matrices where the stacks lie, and nothing else multiplies by them."""
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    args = EngineArgs(model=quantized_checkpoints.write(tmp_path, "int8")[0], deterministic=deterministic, **SMALL)
    config = read_setup(args, Path(args.model)).runner_config(target_here("cpu"), progress=None)
    kernel, rounding = config.backend.cpu_int8
    assert (
        rounding.startswith("jaxllm_codes_float32_")
        and kernel.startswith(f"jaxllm_int8_bfloat16_{int8.forms()[0]}_")
        and not config.backend.cpu_kernels
    )
    given: Any = config.params()
    params: Any = with_whole_layers(given, config.backend, one_row=False)
    (segment,) = params.layers
    for name in MATRICES:
        matrix = getattr(segment, name)
        assert isinstance(matrix, StackedMatrix) and isinstance(matrix.stored, RoundedInputs)
    # parts of a matrix may have no such kernel
    target = dataclasses.replace(config.target, grid=config.target.grid._replace(tensor=2))
    split = with_cpu_kernels(dataclasses.replace(config, target=target), tmp_path).backend
    assert split.cpu_int8 == config.backend.cpu_int8 and bool(split.cpu_kernels) != deterministic


def test_a_quantized_router_has_a_kernel_for_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ERNIE's routers multiply in float32, whatever the engine's dtype is."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    fields = {"architectures": ["Ernie4_5_MoeForCausalLM"], "moe_num_experts": 8, "moe_intermediate_size": 32}
    quantization = {"quant_method": "compressed-tensors", "format": "int-quantized", **groups}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **fields, "quantization_config": quantization}))
    router = "model.layers.1.mlp.gate.weight"
    stored = {router: np.ones((8, 64), np.int8), f"{router}_scale": np.ones((8, 1), np.float32)}
    save_file(stored, tmp_path / "model.safetensors")
    loaded: set[str] = set()
    monkeypatch.setattr(cpu_ffi.KERNELS, "load", lambda names, _: loaded.update(names) or "version")
    args = EngineArgs(model=tmp_path, **{**SMALL, "dtype": "bfloat16"})
    config = read_setup(args, tmp_path).runner_config(target_here("cpu"), progress=None)
    assert config.backend.cpu_kernels and {"rounded_int8", "exact_int8"} <= loaded


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_engine_has_the_kernel_of_its_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool):
    """All programs read the matrices where the stacks lie; rows have one order of sums, so `deterministic` has it."""
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    args = EngineArgs(model=write_tiny_model(tmp_path), deterministic=deterministic, **SMALL)
    config = read_setup(args, Path(args.model)).runner_config(target_here("cpu"), progress=None)
    plain, gated = config.backend.cpu_dense
    assert plain.startswith("jaxllm_dense_float32_") and gated.startswith("jaxllm_gated_silu_float32_")
    assert bool(config.backend.cpu_attention) != deterministic
    given: Any = config.params()
    params: Any = with_whole_layers(given, config.backend)
    (segment,) = params.layers
    assert all(isinstance(getattr(segment, name), StackedMatrix) for name in MATRICES)
    assert not isinstance(params.head, StackedMatrix)


@pytest.mark.parametrize("devices", [1, 4])
def test_an_engine_over_latents_has_the_kernel_that_its_attention_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int
):
    """Of the heads that one device has."""
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    loaded = "jaxllm.runner.compile.cpu_kernels.load_attention"
    monkeypatch.setattr(loaded, lambda form, _: target_name(form.name, 16 * "0"))
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK))
    args = EngineArgs(model=tmp_path, kv_cache_dtype="fp8", load_format="dummy", skip_tokenizer_init=True, **SMALL)
    config = read_setup(args, tmp_path).runner_config(target_here("cpu"), progress=None)
    grid = config.target.grid._replace(tensor=devices)
    config = dataclasses.replace(config, target=dataclasses.replace(config.target, grid=grid))
    config = with_cpu_kernels(config, tmp_path)
    width, heads = DEEPSEEK["kv_lora_rank"] + DEEPSEEK["qk_rope_head_dim"], DEEPSEEK["num_attention_heads"] // devices
    query = jax.ShapeDtypeStruct((1, heads, width), np.float32)
    pages = jax.ShapeDtypeStruct((4, config.block_size, width), config.cache_dtype)
    batch: Any = SimpleNamespace(backend=config.backend)
    found = kernel_for(query, pages, batch, softcap=None, value_width=DEEPSEEK["kv_lora_rank"])  # pyright: ignore
    assert found is not None and (found[0],) == config.backend.cpu_attention and found[1].group == heads


def test_a_program_is_traced_before_its_kernel_is_there(tmp_path: Path):
    """Only what it calls is waited for, and made once, whoever waits."""
    made: list[str] = []

    def module(name: str) -> Any:
        made.append(name)
        if name == "wrong":
            raise ValueError(name)
        return dense_kernel.module("dense_float32_8")

    kernels = Kernels(module, [])
    untouched.load(None)  # after the first kernel, it is known that there can be any
    with later():
        version = kernels.load(["right", "wrong"], tmp_path)
        assert version and kernels.load(["right"], tmp_path) == version and not made
    draw = np.random.default_rng(0)
    x, weight = (draw.normal(size=(rows, 64)).astype(np.float32) for rows in (3, 32))
    operands = x, np.int32(0), weight, np.int32(4)
    result = jax.ShapeDtypeStruct((3, 32), np.float32)
    lowered = jax.jit(jax.ffi.ffi_call(target_name("right", version), result)).lower(*operands)
    finish(lambda: "calls nothing")
    assert not made
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(finish, [lowered.as_text] * 2))
    assert made == ["right"]
    np.testing.assert_allclose(lowered.compile()(*operands), x @ weight.T, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="wrong"):
        finish()
    finish()
    with pytest.raises(ValueError, match="wrong"):
        kernels.load(["wrong"], tmp_path)
    assert kernels.load(["right"], tmp_path) == version
    assert made == ["right", "wrong", "wrong"]


def test_who_waits_for_a_kernel_that_fails_fails_too(tmp_path: Path):
    waiting: list[concurrent.futures.Future[str]] = []

    def module(name: str) -> Any:
        if not waiting:
            waiting.append(pool.submit(kernels.load, [name], tmp_path))
            concurrent.futures.wait(waiting, timeout=0.2)  # until it waits
        raise ValueError(name)

    kernels = Kernels(module, [])
    with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="wrong"):
        kernels.load(["wrong"], tmp_path)
    with pytest.raises(ValueError, match="wrong"):
        waiting[0].result()


@pytest.mark.parametrize(
    "operation", ["dense_matmul", "lora_matmul", "packed_matmul", "paged_attention", "quant_matmul"]
)
def test_a_kernels_version_is_of_all_that_its_code_follows_from(operation: str):
    """Whatever the files that write code read of this package, tables too; else an older kernel would be found."""
    kernels = importlib.import_module(f"pallas_kernels.{operation}.cpu_ffi").KERNELS
    files = [path for source in kernels.sources for path in ([source] if source.is_file() else source.glob("*.py"))]
    read = set()
    for path in files:
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        if any(node.module == "llvmlite" for node in nodes):
            read |= {node.module for node in nodes if (node.module or "").startswith("pallas_kernels.")}
    assert read
    for name in read:
        assert Path(importlib.import_module(name).__file__ or "") in files, name
