"""What a runner says that it holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.runner.memory.device_memory import DeviceMemory


class Memory(DeviceMemory[Any, Any]):
    def _weights_changed(self) -> None:
        pass


def test_a_state_that_a_step_has_consumed_takes_nothing():
    """Where arrays have blocks that nobody writes, they count with the cache, and go with it."""
    weights, spare = jnp.zeros(100), 3000
    allocator: Any = SimpleNamespace(
        sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        param_shardings=weights.sharding,
        spare_bytes=spare,
        allocate=lambda: {"cache": jnp.zeros(1000), "tokens": jnp.zeros(10)},
    )
    memory = Memory(weights, lambda: weights, allocator)
    assert memory.num_bytes == 4 * 1110 - spare
    for array in jax.tree.leaves(memory._state):
        array.delete()
    assert memory.num_bytes == 400
    memory.free_cache()
    assert memory.num_bytes == 400
