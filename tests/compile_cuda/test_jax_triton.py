"""The four-bit kernel by jax-triton: compiled for GPUs that are not there, and run by Triton's interpreter.

Without a GPU, jax-triton can be imported beside JAX's CUDA compiler alone, which has a folder of its own.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from jaxllm.runner.compile.deviceless import CudaCompiler

from .compiling import TARGETS, toolchains

ROOT = Path(__file__).parents[2]

COMPILE = """
import jax, jax.numpy as jnp
from jaxllm.config.devices import gpu_named
from jaxllm.parallel.mesh import make_mesh
from jaxllm.runner.compile.deviceless import devices, lowering_for
from pallas_kernels.backend import Backend
from pallas_kernels.quant_matmul.api import quant_matmul
from pallas_kernels.quant_matmul.layout import Int4Weight
gpu = gpu_named({gpu!r})
device = devices(gpu)[0]
sharding = jax.sharding.SingleDeviceSharding(device)
backend = Backend(implementation="triton", lowering="jax-triton", compute_capability=gpu.compute_capability)
def shape(*sizes, dtype):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)
layers, n, k, group = 4, 6144, 4096, 128
weight = Int4Weight(
    packed=shape(layers, n, k // 2, dtype=jnp.uint8),
    scales=shape(layers, k // group, n, dtype=jnp.bfloat16),
    zeros=shape(layers, k // group, n, dtype=jnp.uint8),
)
product = jax.jit(lambda x, weight, layer: quant_matmul(x, weight, backend=backend, layer=layer))
for rows in (1, 16, 256):
    with lowering_for(make_mesh((device,))):
        lowered = product.lower(shape(rows, k, dtype=jnp.bfloat16), weight, shape(dtype=jnp.int32))
    compiled = lowered.compile()
    assert "quant_matmul" in compiled.as_text()
    # parts of a split K at most: no unpacked weight, and no copy of a layer
    print(rows, compiled.memory_analysis().temp_size_in_bytes)
"""

INTERPRET = """
import jax.numpy as jnp, numpy as np, torch, triton
from pallas_kernels.quant_matmul import jax_triton
from pallas_kernels.quant_matmul.layout import int4_weight, pack
from pallas_kernels.quant_matmul.reference import quant_matmul_reference
draw = np.random.default_rng(0)
layers, layer = 3, 1
for m, n, k, group, split in ((1, 40, 256, 128, 1), (20, 32, 320, 64, 2), (17, 24, 160, 32, 3)):
    weight = int4_weight(
        pack(jnp.asarray(draw.integers(0, 16, (layers, n, k))), group),
        jnp.asarray(draw.normal(size=(layers, k // group, n)), jnp.float16),
        jnp.asarray(draw.integers(0, 17, (layers, k // group, n)), jnp.uint8),
    )
    x = jnp.asarray(draw.normal(size=(m, k)), jnp.float16)
    operands = [torch.from_numpy(np.array(a)) for a in (x, weight.packed, weight.scales, weight.zeros)]
    out = torch.full((split, m, n), float("nan"), dtype=torch.float16 if split == 1 else torch.float32)
    grid = (triton.cdiv(m, 16), triton.cdiv(n, 16), split)
    bits, number = jax_triton._MAGIC["float16"]
    chosen = torch.tensor([layer], dtype=torch.int32)
    jax_triton._kernel[grid](*operands, chosen, out, m, n, k, group, split, 16, 16, bits, number)
    expected = np.asarray(quant_matmul_reference(x, weight.at(jnp.int32(layer))), np.float32)
    np.testing.assert_allclose(out.float().sum(0).numpy(), expected, rtol=2e-3, atol=2e-2)
print("equal")
"""


def run(code: str, **environment: str) -> str:
    """What a process prints that has the compiler and jax-triton; skips where they are not installed."""
    chains = toolchains()
    if not chains:
        pytest.skip("`make compile-cuda` installs the compiler")
    compiler = CudaCompiler(folder=chains[0].folder, cuda="12").environment()

    def process(text: str) -> subprocess.CompletedProcess[str]:
        command = [chains[0].python, "-c", text]
        return subprocess.run(command, env={**compiler, **environment}, cwd=ROOT, capture_output=True, text=True)

    if process("import jax_triton").returncode:
        pytest.skip("pip install '.[triton]' installs jax-triton")
    done = process(code)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles(target: str):
    lines = [tuple(map(int, line.split())) for line in run(COMPILE.format(gpu=TARGETS[target].name)).splitlines()]
    assert [rows for rows, _ in lines] == [1, 16, 256]
    assert all(temporary <= 32 * rows * 6144 * 4 for rows, temporary in lines)


def test_it_computes_what_the_reference_does():
    # the interpreter has no arithmetic of bfloat16
    assert run(INTERPRET, TRITON_INTERPRET="1", JAX_PLATFORMS="cpu").strip() == "equal"
