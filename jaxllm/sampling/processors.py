"""The user's logits processors inside the compiled sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import io_callback

from jaxllm.api.errors import ValidationError
from jaxllm.api.logits_processor import LogitsProcessor, extra_arg_defaults
from jaxllm.api.torch_logits_processor import REQUEST, HostProcessor
from jaxllm.sampling.batch import SamplingBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitsState:
    """What a logits processor may know of each of the R rows. M: at least max_model_len."""

    #: i32 [R, M]: token ids, the prompt's (negative where it has vectors), then the generated ones; anything from
    #: `length` on
    tokens: jax.Array
    #: i32 [R]: how many of `tokens` are valid
    length: jax.Array
    #: i32 [R]: how many of them are prompt
    prompt_length: jax.Array
    #: i32 [R]: position in the sequence of the token to be sampled
    position: jax.Array
    #: f32 [R]; 0 = greedy
    temperature: jax.Array
    #: name -> f32 [R], for every name that a processor declares
    extra_args: dict[str, jax.Array]


def apply_processors(logits: jax.Array, batch: SamplingBatch, processors: Sequence[LogitsProcessor]) -> jax.Array:
    """f32 [R, V] -> f32 [R, V]: every processor, one after the other. Raises as `process`."""
    names = extra_arg_defaults(processors)
    state = LogitsState(
        tokens=batch.history,
        length=batch.length,
        prompt_length=batch.prompt_length,
        position=batch.position,
        temperature=batch.temperature,
        extra_args={name: batch.extra_args[:, i] for i, name in enumerate(names)},
    )
    return process(logits, state, processors)


def process(logits: jax.Array, state: LogitsState, processors: Sequence[LogitsProcessor]) -> jax.Array:
    """Call the processors.

    Raises:
        ValidationError: one fails, or returns something else than logits of the same shape and type.
    """
    for processor in processors:
        if processor.host is not None:
            logits = _on_host(logits, state, processor.host)
            continue
        try:
            result = processor.function(logits, state)
        except Exception as error:
            raise ValidationError(
                f"the logits processor {processor.name} fails for logits float32{list(logits.shape)}: "
                f"{type(error).__name__}: {error}. It must be made of jax operations on (logits, state)."
            ) from error
        shape, dtype = getattr(result, "shape", None), getattr(result, "dtype", None)
        if not isinstance(result, jax.Array) or shape != logits.shape or dtype != logits.dtype:
            seen = f"{dtype}{list(shape)}" if shape is not None else f"{result!r:.80} of type {type(result).__name__}"
            raise ValidationError(
                f"the logits processor {processor.name} must return logits as it got them, "
                f"float32{list(logits.shape)}; it returns {seen}."
            )
        logits = result
    return logits


def _on_host(logits: jax.Array, state: LogitsState, host: HostProcessor) -> jax.Array:
    """f32 [R, V] -> f32 [R, V]: what the host makes of the logits, once for each launch, since it keeps a state."""
    rows = state.tokens, state.length, state.prompt_length, state.temperature, state.extra_args[REQUEST]
    return io_callback(host, jax.ShapeDtypeStruct(logits.shape, logits.dtype), logits, *rows)


def check_processors(processors: Sequence[LogitsProcessor], *, vocab_size: int, max_model_len: int) -> None:
    """Try the processors on shapes alone, before anything is loaded or compiled. Raises as `process`."""
    rows = 8

    def per_row(dtype: type) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows,), dtype)

    state = LogitsState(
        tokens=jax.ShapeDtypeStruct((rows, max_model_len), jnp.int32),  # pyright: ignore[reportArgumentType]
        length=per_row(jnp.int32),  # pyright: ignore[reportArgumentType]
        prompt_length=per_row(jnp.int32),  # pyright: ignore[reportArgumentType]
        position=per_row(jnp.int32),  # pyright: ignore[reportArgumentType]
        temperature=per_row(jnp.float32),  # pyright: ignore[reportArgumentType]
        extra_args={name: per_row(jnp.float32) for name in extra_arg_defaults(processors)},  # pyright: ignore
    )
    logits = jax.ShapeDtypeStruct((rows, vocab_size), jnp.float32)
    jax.eval_shape(lambda logits, state: process(logits, state, processors), logits, state)
