"""What attention is compiled to: the user's choice, where the device and the model allow it."""

from __future__ import annotations

import dataclasses

import jax

from jaxllm.api.errors import ValidationError
from jaxllm.layers.mla import LatentConfig
from jaxllm.models.bert import BertConfig
from jaxllm.models.decoder_config import DecoderConfig
from pallas_kernels.backend import (
    LEAST_COMPUTE_CAPABILITY,
    MAX_HEAD_DIM,
    MAX_LATENT_WIDTHS,
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
    kv_dtype: str | None = None,
) -> Backend:
    """What attention is compiled to.

    Args:
        asked: `EngineArgs.attention_backend`.
        dtype: that the model computes in.
        kv_dtype: numpy's name of the cache's; None: it is `dtype`.

    Raises:
        ValidationError: the device, or the model, cannot have what was asked for.
    """
    best = device_backend(device)
    if asked == "triton" and best.implementation != "triton":
        raise _needs_gpu(asked, f"{_version(LEAST_COMPUTE_CAPABILITY)} or higher", device)
    if asked == "mosaic" and best.compute_capability != MOSAIC_COMPUTE_CAPABILITY:
        raise _needs_gpu(asked, f"{_version(MOSAIC_COMPUTE_CAPABILITY)} (Hopper)", device)
    latents = model.latents if isinstance(model, DecoderConfig) else None
    if latents is not None:
        _check_latents(asked, latents)
        return best if asked == "auto" else dataclasses.replace(best, implementation=asked)
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
            cache_dtype=kv_dtype or dtype,
        )
        if reason:
            raise ValidationError(f"attention_backend='mosaic' is not for this model: {reason}. Leave it out.")
    return best if asked == "auto" else dataclasses.replace(best, implementation=asked)


def _check_latents(asked: str, latents: LatentConfig) -> None:
    """Whether attention over latents can have what was asked for."""
    if asked == "mosaic":
        raise ValidationError(
            "attention_backend='mosaic' is not for this model: it has no kernel for latent attention. Leave it out."
        )
    (most, most_turned), (rank, turned) = MAX_LATENT_WIDTHS, (latents.rank, latents.turned_dim)
    if asked == "triton" and (rank > most or turned > most_turned):
        raise ValidationError(
            f"attention_backend='triton' takes latents of up to {most} numbers and {most_turned} that are turned, and "
            f"the model's have {rank} and {turned}. Leave it out, or pass 'xla'."
        )


def _needs_gpu(asked: str, capability: str, device: jax.Device) -> ValidationError:  # pyright: ignore[reportInvalidTypeForm]
    return ValidationError(
        f"attention_backend={asked!r} needs an NVIDIA GPU of compute capability {capability}, and the device is "
        f"{device.device_kind!r}. Leave it out, or pass 'xla'."
    )


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
