"""Compile an engine's programs for an H200 that is not there, and print what the compiler says of their memory.

Run as a process of its own: a compiler for another target may abort it, and JAX takes its platforms from the
environment. Arguments: the model's config.json as text, max_num_batched_tokens, max_num_seqs, max_model_len, and the
numbers of KV blocks to compile for. Output: one JSON object, bytes by program, for each number of blocks.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxllm.config.cache import kv_cache_groups
from jaxllm.models.registry import model_config
from jaxllm.models.sources import decoder_sources
from jaxllm.runner.buckets import make_buckets
from jaxllm.runner.programs import Programs
from jaxllm.runner.step import State, StepConfig
from jaxllm.weights.loader import shapes

BLOCK_SIZE = 16
#: what XLA needs to know of the GPU
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def main(config: str, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int, *blocks: int) -> None:
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200)
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    model = model_config(json.loads(config))
    groups = kv_cache_groups(model.layer_window)
    page = (2, model.num_kv_heads, BLOCK_SIZE, model.head_dim)
    result: dict[str, Any] = {}
    for num_blocks in blocks:
        pages = num_blocks * max(len(group.layers) for group in groups)
        state = State(
            cache=jax.ShapeDtypeStruct((pages, *page), jnp.bfloat16, sharding=sharding),  # pyright: ignore
            tokens=jax.ShapeDtypeStruct((max_num_seqs + 1, max_model_len), jnp.int32, sharding=sharding),  # pyright: ignore
        )
        programs = Programs(
            StepConfig(
                model=model, groups=groups, num_logprobs=20, logprobs_mode="raw_logprobs", max_scored_tokens=1024
            ),
            make_buckets(max_num_batched_tokens, max_num_seqs, eager=True),
            -(-max_model_len // BLOCK_SIZE),
            shapes(decoder_sources(model), jnp.dtype(jnp.bfloat16), sharding),
            state,
            platform="cuda",
            eager=True,
            cache_dir=None,
        )
        programs.compile_all(progress=False)
        memory: dict[Any, Any] = {key: program.memory_analysis() for key, program in programs._compiled.items()}
        result[str(num_blocks)] = {
            "cache": math.prod(state.cache.shape) * 2,
            "tokens": math.prod(state.tokens.shape) * 4,
            "programs": {
                " ".join(map(str, key)): {
                    "alias": sizes.alias_size_in_bytes,
                    "temporaries": sizes.temp_size_in_bytes,
                    "arguments": sizes.argument_size_in_bytes,
                }
                for key, sizes in memory.items()
            },
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
