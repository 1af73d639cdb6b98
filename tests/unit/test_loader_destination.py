"""Where weights end up: each device gets its part, and nothing is in host memory twice. In processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support.quick_compile import THOROUGH, flags

from jaxllm.layers.weight import is_spec
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.weights import loader

REPOSITORY = Path(__file__).parents[2]

SHARDED = """
import jax, sys
import jax.numpy as jnp, numpy as np
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.mesh import make_mesh
from jaxllm.weights import loader
sys.path.insert(0, sys.argv[1])
from test_loader import CONFIG, CountingReader, SHAPES, by_hand, weights

tensors = weights(); expected = by_hand(tensors)
specs = decoder_specs(model_config(CONFIG))
for devices in (2, 4):
    mesh = make_mesh(jax.devices()[:devices])
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    reader = CountingReader(tensors)
    found = loader.load(reader, specs, jnp.dtype(np.float32), whole, progress=False)
    arrays = {path[-1].name: leaf for path, leaf in jax.tree.flatten_with_path(found)[0]}

    def joined(array, first, *sizes):
        # by device, its rows of each tensor that is joined in the array: [tensor's first row, rows, rows of a device]
        parts = []
        for d in range(devices):
            start = 0
            for size, own in sizes:
                at = start + d * size // devices // own * own
                parts.append(array[:, at : at + own])
                start += size
        return np.concatenate(parts, axis=1)

    kv = max(8 // devices, 4)
    by_device = {
        **expected,
        "qkv": joined(expected["qkv"], 0, (16, 16 // devices), (8, kv), (8, kv)),
        "qkv_bias": joined(expected["qkv_bias"], 0, (16, 16 // devices), (8, kv), (8, kv)),
        "gate_up": joined(expected["gate_up"], 0, (20, 20 // devices), (20, 20 // devices)),
    }
    split_axis = {"embedding": 0, "head": 0, "qkv": 1, "qkv_bias": 1, "output": 2, "gate_up": 1, "down": 2}
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(array), by_device[name], err_msg=name)
        for shard in array.addressable_shards:
            axis = split_axis.get(name, -1)
            assert shard.data.shape == tuple(n // devices if i == axis else n for i, n in enumerate(array.shape)), name
    # rows whose columns are split are read once for all devices; a KV head is read by each that has it
    by_kv_heads = "k_proj", "v_proj"
    for name, rows in reader.rows.items():
        times = kv * devices // 8 if any(part in name for part in by_kv_heads) else 1
        assert rows == SHAPES[name][0] * times, name
    drawn = loader.dummy(specs, jnp.dtype(np.float32), whole)
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.sharding), (b.shape, b.sharding)), drawn, found)
    one, two = (np.asarray(shard.data) for shard in drawn.embedding.addressable_shards[:2])
    assert not np.array_equal(one, two)
print("split as asked")
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


def test_each_device_gets_its_part_and_reads_no_more():
    assert "split as asked" in python(SHARDED, str(Path(__file__).parent), JAX_NUM_CPU_DEVICES="4")


SAVED = """
import jax, sys
import jax.numpy as jnp, numpy as np
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.mesh import make_mesh
from jaxllm.weights import loader
from jaxllm.weights.formats import hugging_face
sys.path.insert(0, sys.argv[1])
from test_loader import CONFIG, CountingReader, weights

tensors = weights()
for name in ("model.embed_tokens.weight", "lm_head.weight"):
    tensors[name] = np.concatenate([tensors[name], tensors[name][:2] + 1])
specs = decoder_specs(model_config({**CONFIG, "vocab_size": 38}))
for devices in (1, 2, 4):
    whole = jax.sharding.NamedSharding(make_mesh(jax.devices()[:devices]), jax.P())
    params = loader.load(CountingReader(tensors), specs, jnp.dtype(np.float32), whole, progress=False)
    found = {tensor.name: tensor.value() for tensor in hugging_face.tensors(specs, params)}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=f"{name} of {devices}")
print("saved as read")
"""


def test_what_is_split_over_devices_is_saved_whole():
    """Its rows of fused tensors lie by device, some devices share a KV head, and the vocabulary is filled up."""
    assert "saved as read" in python(SAVED, str(Path(__file__).parent), JAX_NUM_CPU_DEVICES="4")


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
from jaxllm.models.specs import decoder_specs
from jaxllm.parallel.mesh import make_mesh
from jaxllm.weights.checkpoint import Checkpoint

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

checkpoint = Checkpoint(Path(sys.argv[1]), sys.argv[2])
specs = decoder_specs(model_config(checkpoint.config))
devices = jax.devices()
whole = jax.sharding.SingleDeviceSharding(devices[0])
if len(devices) > 1:
    whole = jax.sharding.NamedSharding(make_mesh(devices), jax.P())
jnp.zeros(1).block_until_ready()
before = status("VmRSS")
params = checkpoint.load(specs, jnp.dtype(jnp.bfloat16), whole, seed=0, progress=False)
jax.block_until_ready(params)
print(status("VmHWM") - before, sum(array.nbytes for array in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the process's memory from /proc")
@pytest.mark.parametrize(("stored", "devices"), [("BF16", 1), ("F32", 1), ("F32", 4), ("dummy", 1)])
def test_weights_are_never_twice_in_host_memory(tmp_path: Path, stored: str, devices: int, record_property):
    """The peak: the weights, one piece of them as it was stored or is drawn, and what the process grows by."""
    (tmp_path / "config.json").write_text(json.dumps(LARGE | ({"num_hidden_layers": 4} if stored == "dummy" else {})))
    if stored != "dummy":
        write_zeros(tmp_path, stored)
    load_format = "dummy" if stored == "dummy" else "auto"
    # hundreds of megabytes are drawn
    options = {"JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": flags(THOROUGH, os.environ["XLA_FLAGS"])}
    peak, size = map(int, python(PEAK, str(tmp_path), load_format, **options).split())
    record_property("peak_bytes", peak)
    print(f"{stored} on {devices}: {size / 2**20:.0f} MiB of weights, peak {peak / 2**20:.0f} MiB")
    assert size > 200 * 2**20
    # a number that is drawn is an integer and a float32 before it is what it becomes
    piece = 16 * loader.PIECE if stored == "dummy" else 4 * loader.READ_PIECE
    # where programs that draw are compiled, the compiler takes 50 MiB
    assert peak < size + piece + 3 * 2**25


def write_zeros(directory: Path, dtype: str) -> None:
    """A checkpoint whose tensors are a hole in the file: it takes no room on the disk, and its full size in memory."""
    header, end = {}, 0
    for spec in jax.tree.leaves(decoder_specs(model_config(LARGE)), is_leaf=is_spec):
        for name, part in spec.tensors():
            size = int(np.prod(part.shape)) * {"BF16": 2, "F32": 4}[dtype]
            header[name] = {"dtype": dtype, "shape": part.shape, "data_offsets": [end, end + size]}
            end += size
    raw = json.dumps(header).encode()
    path = directory / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + end)
