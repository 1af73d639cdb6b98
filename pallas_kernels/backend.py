"""Which implementation of the operations a program is compiled with."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("reference", "xla", "triton", "mosaic")
LOWERINGS = ("pallas", "jax-triton")
#: Pallas' Triton lowering needs tensor cores for bf16
LEAST_COMPUTE_CAPABILITY = (8, 0)
LEAST_E4M3_COMPUTE_CAPABILITY = (8, 9)
#: the kernels in Mosaic are of Hopper's matrix instructions (wgmma), which no GPU before or after it has
MOSAIC_COMPUTE_CAPABILITY = (9, 0)
#: of the attention kernels
MAX_HEAD_DIM = 256
#: of the kernels of attention over latents: numbers of a value, and those behind them
MAX_LATENT_WIDTHS = 512, 64
#: of blocks whose keys are transposed: with shorter ones XLA:CPU would have to put them side by side
LEAST_TRANSPOSED_BLOCK = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """The choice of implementations for one device. Static: a program is compiled with one of these."""

    #: one of `IMPLEMENTATIONS`, best last; an operation that has no such implementation for a shape takes the next best
    implementation: str = "xla"
    #: the device's name as JAX has it ("NVIDIA H200"): picks tile sizes
    device_kind: str = ""
    #: of an NVIDIA device; None: unknown
    compute_capability: tuple[int, int] | None = None
    #: what compiles "triton" kernels: "pallas", or "jax-triton", which has its own for `quant_matmul` alone
    lowering: str = "pallas"
    #: run kernels in Pallas' interpreter, on any device
    interpret: bool = False
    #: version of the kernels for CPUs that this process has loaded (`cpu_ffi.compiled`), which programs call by it; ""
    #: none
    cpu_kernels: str = ""
    #: likewise of the kernels of experts, of products in which rows have matrices of their own
    cpu_grouped: str = ""
    #: by which names programs call the kernels of attention that this process has loaded (`paged_attention.cpu_ffi`)
    cpu_attention: tuple[str, ...] = ()
    #: those of the kernels of dense products (`dense_matmul.cpu_ffi`)
    cpu_dense: tuple[str, ...] = ()
    #: those of the kernels of products of int8 numbers (`quant_matmul.cpu_ffi`)
    cpu_int8: tuple[str, ...] = ()
    #: by which name programs call the kernel of adapters that this process has loaded (`lora_matmul.cpu_ffi`); "": none
    cpu_adapters: str = ""
    #: likewise the kernel that makes large arrays of zeros without writing them (`cpu_ffi.untouched`)
    cpu_untouched: str = ""
    #: a token's numbers do not depend, to the bit, on what it is computed with; only "xla" on a CPU can
    deterministic: bool = False
    #: what pages of uint8 hold the bits of
    float8: str = "float8_e4m3fn"

    def __post_init__(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {self.implementation!r}")
        if self.lowering not in LOWERINGS or (self.lowering == "jax-triton" and self.interpret):
            raise ValueError(f"lowering must be one of {LOWERINGS}, 'pallas' to interpret; got {self.lowering!r}")
        other = self.compute_capability not in (None, MOSAIC_COMPUTE_CAPABILITY)
        if self.implementation == "mosaic" and other and not self.interpret:
            raise ValueError(
                f"implementation 'mosaic' needs a GPU of compute capability {MOSAIC_COMPUTE_CAPABILITY} (Hopper), and "
                f"{self.device_kind!r} has {self.compute_capability}; use 'triton'"
            )

    @classmethod
    def of(cls, *, platform: str, device_kind: str = "", compute_capability: tuple[int, int] | None = None) -> Backend:
        """What is fastest on a device: the kernels on NVIDIA GPUs from Ampere on, plain XLA elsewhere.

        Mosaic is never chosen unasked: what it has has not been measured against the Triton kernels.
        """
        is_gpu = platform in ("cuda", "gpu")
        kernels = is_gpu and (compute_capability is None or compute_capability >= LEAST_COMPUTE_CAPABILITY)
        return cls(
            implementation="triton" if kernels else "xla",
            device_kind=device_kind,
            compute_capability=compute_capability,
        )

    def supports(self, stored: jnp.dtype) -> bool:
        """Whether kernels can read and write numbers of this dtype: casts of float8_e4m3fn came with Ada."""
        if stored == jnp.uint8:
            return False
        if self.interpret or self.compute_capability is None or stored != jnp.float8_e4m3fn:
            return True
        return self.compute_capability >= LEAST_E4M3_COMPUTE_CAPABILITY

    def numbers(self, stored: jnp.dtype) -> jnp.dtype:
        """What pages of this dtype hold: it, or the float8 whose bits they are."""
        return jnp.dtype(self.float8) if stored == jnp.uint8 else jnp.dtype(stored)

    def transposes_keys(self, block_size: int) -> bool:
        """Whether pages hold keys as [head_dim, block_size], as products on CPUs read them; on GPUs rows are read."""
        return self.implementation == "xla" and block_size >= LEAST_TRANSPOSED_BLOCK


def device_backend(device: jax.Device) -> Backend:  # pyright: ignore[reportInvalidTypeForm]
    """`Backend.of` a device of JAX's, present or described by a topology."""
    capability = getattr(device, "compute_capability", None)
    return Backend.of(
        platform=device.platform,
        device_kind=device.device_kind,
        compute_capability=tuple(map(int, str(capability).split("."))) if capability else None,  # pyright: ignore
    )
