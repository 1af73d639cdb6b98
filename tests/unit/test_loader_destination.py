"""Where weights end up: each device gets its slice, and nothing is in host memory twice. In processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm.models.registry import model_config
from jaxllm.models.sources import decoder_sources
from jaxllm.weights import loader

REPOSITORY = Path(__file__).parents[2]

SHARDED = """
import jax, json, sys
import jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxllm.models.registry import model_config
from jaxllm.models.sources import decoder_sources
from jaxllm.weights import loader
sys.path.insert(0, sys.argv[1])
from test_loader import CONFIG, CountingReader, SHAPES, by_hand, weights

assert len(jax.devices()) == 4
mesh = jax.make_mesh((4,), ("x",))
tensors = weights()
expected = by_hand(tensors)
for axis in range(3):
    sources = decoder_sources(model_config(CONFIG))
    named = {path[-1].name: s for path, s in jax.tree.flatten_with_path(sources, is_leaf=loader._is_source)[0]}
    named = {name: s for name, s in named.items() if len(s.shape) > axis}
    reader = CountingReader(tensors)
    for name, source in named.items():
        sharding = NamedSharding(mesh, P(*[None] * axis, "x"))
        index = {device: i for device, i in sharding.devices_indices_map(source.shape).items()}
        array = jax.make_array_from_callback(
            source.shape, sharding, lambda i, s=source: loader._read(reader, s, i, jnp.dtype(np.float32))
        )
        np.testing.assert_array_equal(np.asarray(array), expected[name])
        for shard in array.addressable_shards:
            assert shard.data.shape == tuple(n // 4 if i == axis else n for i, n in enumerate(source.shape))
            np.testing.assert_array_equal(np.asarray(shard.data), expected[name][index[shard.device]])
    # over columns every device reads the rows that it takes a part of
    for name, source in named.items():
        for tensor, _ in source.tensors():
            columns = axis == len(source.shape) - 1 and source.columns is not None
            assert reader.rows[tensor] == SHAPES[tensor][0] * (4 if columns else 1), (axis, tensor)

whole = loader.load(CountingReader(tensors), decoder_sources(model_config(CONFIG)), jnp.dtype(np.float32),
                    NamedSharding(mesh, P("x")), progress=False)
leaves = {path[-1].name: leaf for path, leaf in jax.tree.flatten_with_path(whole)[0]}
assert all(np.array_equal(np.asarray(leaf), expected[name]) for name, leaf in leaves.items())
replicated = loader.load(reader := CountingReader(tensors), decoder_sources(model_config(CONFIG)),
                         jnp.dtype(np.float32), NamedSharding(mesh, P()), progress=False)
assert reader.rows == {name: shape[0] for name, shape in SHAPES.items()}
random = loader.dummy(decoder_sources(model_config(CONFIG)), jnp.dtype(np.float32), NamedSharding(mesh, P("x")))
assert random.embedding.addressable_shards[0].data.shape == (9, 16)
print("sharded as asked")
"""


def python(script: str, *arguments: str, **environment: str) -> str:
    """Run Python in a process of its own; its output."""
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_each_device_gets_its_slice_and_reads_no_more():
    assert "sharded as asked" in python(SHARDED, str(Path(__file__).parent), JAX_NUM_CPU_DEVICES="4")


# A dozen layers of a small model, 384 MiB in bfloat16.
LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
PEAK = """
import jax, jax.numpy as jnp, sys
from pathlib import Path
from jaxllm.models.registry import model_config
from jaxllm.models.sources import decoder_sources
from jaxllm.weights.checkpoint import Checkpoint

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

checkpoint = Checkpoint(Path(sys.argv[1]), sys.argv[2])
sources = decoder_sources(model_config(checkpoint.config))
device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
jnp.zeros(1).block_until_ready()
before = status("VmRSS")
params = checkpoint.load(sources, jnp.dtype(jnp.bfloat16), device, seed=0, progress=False)
jax.block_until_ready(params)
print(status("VmHWM") - before, sum(array.nbytes for array in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the process's memory from /proc")
@pytest.mark.parametrize("stored", ["BF16", "F32", "dummy"])
def test_weights_are_never_twice_in_host_memory(tmp_path: Path, stored: str, record_property):
    """The peak: the weights, one piece of them as it was stored, and what the process grows by."""
    (tmp_path / "config.json").write_text(json.dumps(LARGE | ({"num_hidden_layers": 4} if stored == "dummy" else {})))
    if stored != "dummy":
        write_zeros(tmp_path, stored)
    peak, size = map(int, python(PEAK, str(tmp_path), "dummy" if stored == "dummy" else "auto").split())
    record_property("peak_bytes", peak)
    print(f"{stored}: {size / 2**20:.0f} MiB of weights, peak {peak / 2**20:.0f} MiB")
    assert size > 200 * 2**20
    assert peak < size + 4 * (loader.PIECE if stored == "dummy" else loader.READ_PIECE) + 2**26


def write_zeros(directory: Path, dtype: str) -> None:
    """A checkpoint whose tensors are a hole in the file: it takes no room on the disk, and its full size in memory."""
    header, end = {}, 0
    for source in jax.tree.leaves(decoder_sources(model_config(LARGE)), is_leaf=loader._is_source):
        for layer in range(source.layers or 1):
            for part in source.parts:
                shape = [part.rows] if source.columns is None else [part.rows, source.columns]
                size = int(np.prod(shape)) * {"BF16": 2, "F32": 4}[dtype]
                name = part.name.format(layer=layer)
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
                end += size
    raw = json.dumps(header).encode()
    path = directory / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + end)
