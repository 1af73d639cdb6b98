"""What attention is compiled to: the user's choice, where the device and the model allow it."""

from __future__ import annotations

import dataclasses

import jax

from jaxllm.errors import ValidationError
from pallas_kernels.backend import LEAST_COMPUTE_CAPABILITY, MAX_HEAD_DIM, Backend, device_backend


def attention_backend(asked: str, device: jax.Device, head_dim: int) -> Backend:  # pyright: ignore[reportInvalidTypeForm]
    """What attention is compiled to.

    Args:
        asked: `EngineArgs.attention_backend`.

    Raises:
        ValidationError: the device, or the model's heads, cannot have what was asked for.
    """
    best = device_backend(device)
    if asked == "auto" or asked == best.implementation:
        chosen = best
    elif asked == "triton":
        least = ".".join(map(str, LEAST_COMPUTE_CAPABILITY))
        raise ValidationError(
            f"attention_backend='triton' needs an NVIDIA GPU of compute capability {least} or higher, and the device "
            f"is {device.device_kind!r}. Leave it out, or pass 'xla'."
        )
    else:
        chosen = dataclasses.replace(best, implementation=asked)
    if asked == "triton" and head_dim > MAX_HEAD_DIM:
        raise ValidationError(
            f"attention_backend='triton' takes heads of up to {MAX_HEAD_DIM} numbers, and the model's have {head_dim}. "
            "Leave it out, or pass 'xla'."
        )
    return chosen
