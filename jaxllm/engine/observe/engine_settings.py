"""What an engine was started with, as far as it decides how a workload fares; None where it is not known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Under the arguments' names, and beside them what the memory plan has found."""

    #: "jaxllm" or "vllm"
    engine: str = "jaxllm"
    model: str = ""
    #: JAX's name of the device's kind, such as "cpu"
    platform: str | None = None
    max_num_seqs: int | None = None
    #: where it is less than `max_num_seqs`
    max_num_active_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    #: of pictures; None: there are none
    max_num_encoder_input_tokens: int | None = None
    max_model_len: int | None = None
    block_size: int | None = None
    #: blocks of the KV cache, block 0 included, which holds nothing
    num_blocks: int | None = None
    #: of each group of layers, the tokens that it sees; None: all
    windows: tuple[int | None, ...] = (None,)
    #: that a block takes on each device, and would take as int8; None: it would take no less
    block_bytes: int | None = None
    int8_block_bytes: int | None = None
    #: which argument decided `num_blocks`: gpu_memory_utilization, kv_cache_memory_bytes or num_gpu_blocks_override
    sized_by: str = "gpu_memory_utilization"
    gpu_memory_utilization: float | None = None
    #: of each device, all of them, and those of weights, of activations and of the engine's state
    total_bytes: int | None = None
    weight_bytes: int | None = None
    other_bytes: int | None = None
    #: how many devices there are beside those of this engine's copies of the model
    more_devices: int = 0
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    #: GiB
    kv_offloading_size: float = 0.0
    #: bytes that a block takes in the host's memory, of all devices, times the copies of the model; None: none may lie
    #: there
    host_block_bytes: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    async_scheduling: bool = True
    enforce_eager: bool = False
    #: whether steps of up to four tokens have a program of their own
    has_four_rows: bool = False
    num_decode_steps: int = 1
    #: whether launches have one decode step each, whatever is asked for
    one_step_at_a_time: bool = False
    long_prefill_token_threshold: int = 0
    long_prefill_token_threshold_adaptive: bool = False
    #: most drafts of a step; 0: nobody makes any
    num_speculative_tokens: int = 0
    tokenizer_pool_size: int | None = None
    #: processors that the engine's process may use
    num_processors: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Of what JSON knows."""
        return dataclasses.asdict(self) | {"windows": list(self.windows)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> EngineSettings:
        """Of a `to_dict`, perhaps of another version: what is not known here is left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in fields.items() if name in known}
        if "windows" in given:
            given["windows"] = tuple(given["windows"])
        return cls(**given)
