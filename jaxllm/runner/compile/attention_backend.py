"""What attention is compiled to: the user's choice, where the device and the model allow it."""

from __future__ import annotations

import dataclasses

import jax

from jaxllm.api.errors import ValidationError
from jaxllm.models.bert import BertConfig
from jaxllm.models.decoder import DecoderConfig
from pallas_kernels.backend import (
    LEAST_COMPUTE_CAPABILITY,
    MAX_HEAD_DIM,
    MOSAIC_COMPUTE_CAPABILITY,
    Backend,
    device_backend,
)
from pallas_kernels.paged_attention.mosaic_tiles import why_not


def attention_backend(
    asked: str,
    device: jax.Device,  # pyright: ignore[reportInvalidTypeForm]
    model: DecoderConfig | BertConfig,
    dtype: str,
    block_size: int,
) -> Backend:
    """What attention is compiled to.

    Args:
        asked: `EngineArgs.attention_backend`.
        dtype: that the model computes in and the cache has.

    Raises:
        ValidationError: the device, or the model, cannot have what was asked for.
    """
    best = device_backend(device)
    if asked == "triton" and best.implementation != "triton":
        raise _needs_gpu(asked, f"{_version(LEAST_COMPUTE_CAPABILITY)} or higher", device)
    if asked == "mosaic" and best.compute_capability != MOSAIC_COMPUTE_CAPABILITY:
        raise _needs_gpu(asked, f"{_version(MOSAIC_COMPUTE_CAPABILITY)} (Hopper)", device)
    if asked == "triton" and model.head_dim > MAX_HEAD_DIM:
        raise ValidationError(
            f"attention_backend='triton' takes heads of up to {MAX_HEAD_DIM} numbers, and the model's have "
            f"{model.head_dim}. Leave it out, or pass 'xla'."
        )
    if asked == "mosaic":
        reason = why_not(
            heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            block_size=block_size,
            query_dtype=dtype,
            cache_dtype=dtype,
        )
        if reason:
            raise ValidationError(f"attention_backend='mosaic' is not for this model: {reason}. Leave it out.")
    return best if asked == "auto" else dataclasses.replace(best, implementation=asked)


def _needs_gpu(asked: str, capability: str, device: jax.Device) -> ValidationError:  # pyright: ignore[reportInvalidTypeForm]
    return ValidationError(
        f"attention_backend={asked!r} needs an NVIDIA GPU of compute capability {capability}, and the device is "
        f"{device.device_kind!r}. Leave it out, or pass 'xla'."
    )


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
