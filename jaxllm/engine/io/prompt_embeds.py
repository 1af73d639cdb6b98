"""Prompts that come as vectors, one a token, in place of the rows of the model's own table."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError


class EmbedsReader:
    """Brings a prompt's vectors into the model's form.

    Args:
        hidden_size: numbers of a vector.
        dtype: what the model computes in.
    """

    def __init__(self, hidden_size: int, dtype: np.dtype):
        self._hidden_size, self._dtype = hidden_size, dtype

    def read(self, given: Any) -> np.ndarray:
        """A copy of `given` as an array [tokens, hidden_size].

        Args:
            given: an array of numpy, JAX or torch, or lists of numbers: [tokens, hidden_size], or a batch of one.

        Raises:
            ValidationError: it is something else, as vLLM says it where vLLM refuses it too.
        """
        array = _as_array(given)
        if array.ndim == 3 and array.shape[0] == 1:
            array = array[0]
        if array.ndim != 2:
            raise ValidationError(
                "`prompt_embeds` must be a 2D tensor of shape (num_tokens, hidden_size); got shape "
                f"{tuple(array.shape)}."
            )
        if array.shape[0] == 0:
            raise ValidationError("The decoder prompt cannot be empty")
        if array.shape[1] != self._hidden_size:
            raise ValidationError(
                f"`prompt_embeds` hidden_size {array.shape[1]} does not match the model's hidden_size "
                f"{self._hidden_size}."
            )
        if not _is_float(array.dtype):
            raise ValidationError(
                f"`prompt_embeds` dtype {array.dtype} is not a floating-point type, cannot safely cast to the model's "
                f"dtype {self._dtype}."
            )
        with np.errstate(over="ignore"):  # said below
            embeds = np.array(array, dtype=self._dtype, order="C")
        finite = np.isfinite(embeds).all(axis=1)
        if not finite.all():
            raise ValidationError(
                f"`prompt_embeds` has numbers that are NaN or infinite in {self._dtype}, first in row "
                f"{int(np.argmin(finite))}."
            )
        return embeds


def _as_array(given: Any) -> np.ndarray:
    try:
        if hasattr(given, "detach"):  # torch: off the graph, and numpy has no bfloat16 of its own
            tensor = given.detach().cpu()
            return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
        return np.asarray(given)
    except (TypeError, ValueError) as error:  # lists of different lengths, things that are no arrays
        kind = type(given).__name__
        raise ValidationError(f"`prompt_embeds` must be an array of numbers, got {kind}: {error}") from None


def _is_float(dtype: np.dtype) -> bool:
    # the small floats of JAX are types of their own
    return np.issubdtype(dtype, np.floating) or dtype.name.startswith(("bfloat", "float"))
