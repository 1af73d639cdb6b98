"""The memory plan: weights by their shapes, activations by the compiler's own account, the rest for the KV cache."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import psutil

from jaxllm.config.control_group import control_group
from jaxllm.runner.memory.plan_html import plan_html

GIB = 2**30
#: on CPU the cache competes with everything else that runs; ask for more with kv_cache_memory_bytes
CPU_CACHE_LIMIT = 2 * GIB
#: 2: Linux counts what is reserved as taken
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes that an engine will use on each device, and what they hold."""

    device: str
    #: JAX's name for its kind, such as "cpu"
    platform: str
    #: what the device has in all; on CPU, what was available
    total_bytes: int
    gpu_memory_utilization: float
    weight_bytes: int
    #: temporaries and outputs of the largest compiled step
    activation_bytes: int
    #: token ids and the empty constraint buffer, which live as long as the engine; and of pictures, `encoder_bytes`
    state_bytes: int
    kv_cache_bytes: int
    #: what the cache was not allowed to exceed, in bytes, though there was more; None: nothing
    kv_cache_limit: int | None
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    #: tokens that the cache holds
    num_tokens: int
    #: requests of max_model_len tokens that fit at once
    max_concurrency: float
    #: bytes that a token takes in the cache
    kv_bytes_per_token: int
    #: devices that share the model, each with the above
    tensor_parallel_size: int = 1
    #: copies of the model, each on devices with the above
    data_parallel_size: int = 1
    #: copies that have one copy of the weights between them, of which `weight_bytes` is one part
    weight_sharers: int = 1
    #: stages of layers, of which this one has the least room
    pipeline_parallel_size: int = 1
    stage: int = 0
    #: of the host's memory, for blocks of each replica that leave its cache
    host_cache_bytes: int = 0
    num_host_blocks: int = 0
    #: of each device's weights, what lies in the machine's memory, of how many layers (of the stage)
    host_weight_bytes: int = 0
    num_host_layers: int = 0
    #: what of `gpu_memory_utilization` nothing is planned for, and why; 0 where it does not suffice
    unused_bytes: int = 0
    unused_why: str = ""
    #: of pictures: what is encoded and on its way (part of the state), the tower's weights (part of the weights), and
    #: the vectors of the largest picture that is planned for, 0 where the engine sees none
    encoder_bytes: int = 0
    tower_bytes: int = 0
    encoder_tokens: int = 0
    encoder_cache_tokens: int = 0
    #: of adapters, part of the state: all that the device has room for, of this rank, and one on its way
    adapter_bytes: int = 0
    max_loras: int = 0
    max_lora_rank: int = 0
    #: requests that compiled steps have room for, `max_num_seqs` or a few more
    num_rows: int = 0
    #: temporaries of the encoder (the activations are the larger of these and the largest step's); None: not known
    encoder_activation_bytes: int | None = None

    @property
    def cache_name(self) -> str:
        """vLLM's name of the cache where it lies on a GPU; on a CPU it is the host's own memory."""
        return "KV cache" if self.platform == "cpu" else "GPU KV cache"

    @property
    def used_bytes(self) -> int:
        """What is planned for, of each device."""
        return self.weight_bytes + self.activation_bytes + self.state_bytes + self.kv_cache_bytes

    def __str__(self) -> str:
        gib = lambda b: f"{b / GIB:8.3f} GiB"  # noqa: E731
        limit = self.kv_cache_limit
        note = f"; at most {limit / GIB:g} GiB unless kv_cache_memory_bytes says more" if limit else ""
        whole = self.used_bytes + self.unused_bytes
        sharers = self.weight_sharers
        shared = f"  (a part: {sharers} replicas share {self.weight_bytes * sharers / GIB:.3f} GiB)"
        of_stage = ""
        if self.pipeline_parallel_size > 1:
            of_stage = f", stage {self.stage + 1} of {self.pipeline_parallel_size}, which has the least room"
        unused = f"  not used     {gib(self.unused_bytes)}  (of {whole / GIB:.3f}; {self.unused_why})"
        return "\n".join(
            [
                f"Memory plan on {self.device} ({self.total_bytes / GIB:.2f} GiB, "
                f"gpu_memory_utilization={self.gpu_memory_utilization:g}{of_stage})",
                f"  weights      {gib(self.weight_bytes)}{shared if sharers > 1 else ''}",
                f"  activations  {gib(self.activation_bytes)}  (largest step: {self.max_num_batched_tokens} tokens)",
                f"  state        {gib(self.state_bytes)}  (token ids and constraints of {self.num_rows} rows)",
                f"  KV cache     {gib(self.kv_cache_bytes)}  ({self.num_blocks} blocks of {self.block_size} tokens, "
                f"one of them for padding{note})",
                *([unused] if self.unused_bytes else []),
                *self._encoder_lines(),
                *self._adapter_lines(),
                *self._host_lines(),
                *self.vllm_lines(),
            ]
        )

    def _encoder_lines(self) -> list[str]:
        """What pictures take of the above."""
        if not self.encoder_tokens:
            return []
        own, computing = self.tower_bytes + self.encoder_bytes, ""
        if self.encoder_activation_bytes is not None:
            computing = f"; activations of the largest: {self.encoder_activation_bytes / GIB:.3f} GiB"
        return [
            f"  of it images {own / GIB:8.3f} GiB  (tower {self.tower_bytes / GIB:.3f}; {self.encoder_cache_tokens:,} "
            f"vectors of up to {self.encoder_tokens:,} an image kept: {self.encoder_bytes / GIB:.3f}{computing})"
        ]

    def _adapter_lines(self) -> list[str]:
        """What adapters take of the state."""
        if not self.max_loras:
            return []
        size = f"{self.adapter_bytes / GIB:8.3f} GiB"
        return [f"  of it LoRA   {size}  ({self.max_loras} adapters of rank {self.max_lora_rank}, and one on its way)"]

    def _host_lines(self) -> list[str]:
        """What lies in the machine's memory."""
        lines = []
        if self.num_host_layers:
            size = f"{self.host_weight_bytes / GIB:8.3f} GiB"
            lines.append(
                f"  host weights {size}  ({self.num_host_layers} layers, in the machine's memory; a step copies them)"
            )
        if self.num_host_blocks:
            each = f", for each of {self.data_parallel_size} replicas" if self.data_parallel_size > 1 else ""
            size = f"{self.host_cache_bytes / GIB:8.3f} GiB"
            lines.append(f"  host KV pool {size}  ({self.num_host_blocks} blocks, in the machine's memory{each})")
        return lines

    def _repr_html_(self) -> str:
        return plan_html(self)

    def vllm_lines(self) -> list[str]:
        """The capacity in vLLM's words."""
        each = f", on each of {self.data_parallel_size} replicas" if self.data_parallel_size > 1 else ""
        return [
            f"{self.cache_name} size: {self.num_tokens:,} tokens, "
            f"Maximum concurrency for {self.max_model_len:,} tokens per request: {self.max_concurrency:.2f}x{each}"
        ]


def host_memory() -> int:
    """Bytes that the machine, or the container's limit, has available."""
    available, left = psutil.virtual_memory().available, control_group().memory_left
    return available if left is None else min(available, left)


def device_memory(device: jax.Device) -> tuple[int, int]:  # pyright: ignore[reportInvalidTypeForm]
    """(total, free) bytes of a device; on CPU both are what the machine, or the container's limit, has available."""
    if device.platform == "cpu":
        available = host_memory()
        return available, available
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        raise RuntimeError(
            f"{device} does not tell its memory, which JAX's own allocator does: unset XLA_PYTHON_CLIENT_ALLOCATOR"
        )
    return stats["bytes_limit"], stats["bytes_limit"] - stats["bytes_in_use"]


def reservable_memory() -> int:
    """Bytes of the machine's memory, whatever is free of it, where what an array reserves costs nothing; 0: it counts
    against a limit (`ulimit -v`, or Linux's `vm.overcommit_memory=2`).
    """
    if sys.platform != "linux":
        return 0
    import resource

    try:
        is_strict = _OVERCOMMIT.read_text().strip() == "2"
    except OSError:  # some sandboxes do not say
        is_strict = False
    if is_strict or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return 0
    return psutil.virtual_memory().total


def quantize_blocks(num_blocks: int) -> int:
    """Round down to six significant bits: free memory differs a little from start to start, and the cache's size is
    part of every compiled step, so that an exact number would defeat the compile cache. Costs at most 1/32 of the
    blocks."""
    step = 1 << max(0, num_blocks.bit_length() - 6)
    return num_blocks // step * step
