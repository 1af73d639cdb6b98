"""Much can be known of an NVIDIA GPU by its name, without having it.

Memory is what CUDA gives a process (``cudaMemGetInfo``'s total, what torch calls capacity), which is less than what
nvidia-smi shows, since the driver keeps some: of 40960, 81920, 23034, 24564, 81559, 143771 and 183359 MiB, in the
table's order, a process has about 40339, 81158, 22558, 24080, 81008, 143155 and 182642. A plan of nvidia-smi's numbers
would promise what nobody can have.

Sources: memory, bandwidth, clocks, cores, caches and limits of A100, H100, H200 and B200 are what XLA itself records of
them (``xla/backends/gpu/target_config/specs/*.txtpb``, read from real cards), but for the memory of the H200: XLA has
141.00 GiB, more than nvidia-smi, where CUDA reports 139.72 to 139.81 GiB (torch's messages: "GPU 0 has a total capacity
of 139.80 GiB"). L4 and RTX 4090 are not there: memory as CUDA reports it under Linux (22.03 and 23.52 GiB), bandwidth,
clocks and L2 of NVIDIA's Ada whitepaper, limits of compute capability 8.9 from the CUDA C++ Programming Guide's table
of technical specifications. Dense bfloat16 rates (float32 accumulation, no sparsity) are the data sheets'. Cards of one
name differ a little between boards and drivers.
"""

from __future__ import annotations

import dataclasses
import difflib

from jaxllm.api.errors import ValidationError

_MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPU:
    """What a compiler, a kernel or a memory plan must know of a GPU."""

    #: under which jaxllm knows it
    name: str
    #: the driver's name for it
    description: str
    #: that a process can have, as CUDA reports it
    memory_bytes: int
    #: bytes per second
    memory_bandwidth: int
    #: (major, minor)
    compute_capability: tuple[int, int]
    #: streaming multiprocessors
    num_sms: int
    #: float32 units of each
    fpus_per_sm: int
    clock_ghz: float
    #: bytes that a block may have without asking for more, at most, and of all blocks on one multiprocessor
    shared_memory_per_block: int = 48 * 2**10
    shared_memory_per_block_optin: int
    shared_memory_per_sm: int
    #: 32-bit registers of one multiprocessor, all of which one block may have
    registers_per_sm: int = 65536
    threads_per_sm: int
    l2_bytes: int
    #: bfloat16 matrix products with float32 accumulation, without sparsity, per second
    bf16_flops: float

    @property
    def architecture(self) -> str:
        """The compiler's name for it, such as "sm_90"."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}"


def _ampere(name: str, description: str, memory_bytes: int, memory_bandwidth: int) -> GPU:
    return GPU(
        name=name,
        description=description,
        memory_bytes=memory_bytes,
        memory_bandwidth=memory_bandwidth,
        compute_capability=(8, 0),
        num_sms=108,
        fpus_per_sm=64,
        clock_ghz=1.41,
        shared_memory_per_block_optin=166912,
        shared_memory_per_sm=167936,
        threads_per_sm=2048,
        l2_bytes=40 * _MIB,
        bf16_flops=312e12,
    )


def _ada(
    name: str,
    description: str,
    *,
    memory_bytes: int,
    memory_bandwidth: int,
    num_sms: int,
    clock_ghz: float,
    l2_bytes: int,
    bf16_flops: float,
) -> GPU:
    return GPU(
        name=name,
        description=description,
        memory_bytes=memory_bytes,
        memory_bandwidth=memory_bandwidth,
        compute_capability=(8, 9),
        num_sms=num_sms,
        fpus_per_sm=128,
        clock_ghz=clock_ghz,
        shared_memory_per_block_optin=101376,
        shared_memory_per_sm=102400,
        threads_per_sm=1536,
        l2_bytes=l2_bytes,
        bf16_flops=bf16_flops,
    )


def _hopper(name: str, description: str, memory_bytes: int, memory_bandwidth: int) -> GPU:
    return GPU(
        name=name,
        description=description,
        memory_bytes=memory_bytes,
        memory_bandwidth=memory_bandwidth,
        compute_capability=(9, 0),
        num_sms=132,
        fpus_per_sm=128,
        clock_ghz=1.98,
        shared_memory_per_block_optin=232448,
        shared_memory_per_sm=233472,
        threads_per_sm=2048,
        l2_bytes=50 * _MIB,
        bf16_flops=989.4e12,
    )


_ALL = (
    _ampere("a100-40g", "NVIDIA A100-SXM4-40GB", 42_298_834_944, 1_555_200_000_000),
    _ampere("a100-80g", "NVIDIA A100-SXM4-80GB", 85_100_068_864, 2_039_040_000_000),
    _ada(
        "l4",
        "NVIDIA L4",
        memory_bytes=22558 * _MIB,
        memory_bandwidth=300_096_000_000,
        num_sms=58,
        clock_ghz=2.04,
        l2_bytes=48 * _MIB,
        bf16_flops=121e12,
    ),
    _ada(
        "rtx4090",
        "NVIDIA GeForce RTX 4090",
        memory_bytes=24080 * _MIB,
        memory_bandwidth=1_008_096_000_000,
        num_sms=128,
        clock_ghz=2.52,
        l2_bytes=72 * _MIB,
        bf16_flops=165.2e12,
    ),
    _hopper("h100", "NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
    _hopper("h200", "NVIDIA H200", 143155 * _MIB, 4_800_000_000_000),
    GPU(
        name="b200",
        description="NVIDIA B200",
        memory_bytes=191_514_411_008,
        memory_bandwidth=7_672_320_000_000,
        compute_capability=(10, 0),
        num_sms=148,
        fpus_per_sm=128,
        clock_ghz=1.965,
        shared_memory_per_block_optin=232448,
        shared_memory_per_sm=233472,
        threads_per_sm=2048,
        l2_bytes=132_644_864,
        bf16_flops=2250e12,
    ),
)
GPUS: dict[str, GPU] = {gpu.name: gpu for gpu in _ALL}

#: the machine's own processor; its memory is asked of the machine
CPU = "cpu"
DEVICE_NAMES: tuple[str, ...] = (*GPUS, CPU)


def device_name(text: str) -> str:
    """Return the name in `DEVICE_NAMES` that `text` means: letters' case, "_" and spaces do not matter.

    Raises:
        ValidationError: there is none; the text lists the known names.
    """
    name = "-".join(text.strip().lower().replace("_", " ").replace("-", " ").split()).removeprefix("nvidia-")
    if name in DEVICE_NAMES:
        return name
    close = [known for known in DEVICE_NAMES if known.startswith(name) and name]
    close = close or difflib.get_close_matches(name, DEVICE_NAMES, n=1)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValidationError(f"{text!r} is not a device that jaxllm knows.{hint} It knows: {', '.join(DEVICE_NAMES)}.")


def gpu_named(text: str) -> GPU:
    """Return the GPU of a name, as `device_name` reads it.

    Raises:
        ValidationError: there is none; the text lists the known names.
    """
    name = device_name(text)
    if name not in GPUS:
        raise ValidationError(f"{name!r} is not a GPU; the GPUs that jaxllm knows: {', '.join(GPUS)}.")
    return GPUS[name]
