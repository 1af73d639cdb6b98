"""What some requests ask of the sampler beyond a few numbers: biases, allowed tokens, banned words, and
tokens whose log-probabilities are wanted.

These are wide (a mask has a bit for every token of the vocabulary), so they travel in a second buffer, and only in
steps where a row needs one. `ConstraintShape` is its layout; `RowConstraints` is one request's part of it.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax import lax

from jaxllm.api.sampling_params import MAX_LOGPROB_TOKEN_IDS
from jaxllm.engine.step import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_BIASES, AdmittedRequest


@dataclasses.dataclass(frozen=True)
class ConstraintShape:
    """Words of one row: bias ids, bias values, whether the mask counts, the mask, banned sequences, tokens to
    report.
    """

    vocab_size: int

    @property
    def mask_words(self) -> int:
        return -(-self.vocab_size // 32)

    @property
    def row_size(self) -> int:
        return 2 * MAX_BIASES + 1 + self.mask_words + MAX_BAD_WORDS * MAX_BAD_WORD_TOKENS + MAX_LOGPROB_TOKEN_IDS

    @property
    def mask(self) -> slice:
        """The mask among a row's words; the word before it says whether it counts."""
        return slice(2 * MAX_BIASES + 1, 2 * MAX_BIASES + 1 + self.mask_words)

    def full_mask(self) -> np.ndarray:
        """int32 [mask_words] with the bits of all tokens, and no others."""
        return _bits(np.arange(self.mask_words * 32) < self.vocab_size)

    def empty(self, rows: int) -> np.ndarray:
        """A buffer int32 [rows, row_size] that constrains nothing."""
        buffer = np.zeros((rows, self.row_size), np.int32)
        buffer[:, :MAX_BIASES] = -1
        buffer[:, 2 * MAX_BIASES + 1 + self.mask_words :] = -1
        return buffer

    def unpack(self, buffer: jax.Array) -> dict[str, jax.Array]:
        """Fields of a device buffer int32 [R, row_size], by `SamplingBatch`'s names."""
        mask = 2 * MAX_BIASES + 1
        words = buffer[:, mask + self.mask_words : -MAX_LOGPROB_TOKEN_IDS]
        return {
            "bias_ids": buffer[:, :MAX_BIASES],
            "bias_values": lax.bitcast_convert_type(buffer[:, MAX_BIASES : 2 * MAX_BIASES], np.float32),
            "use_mask": buffer[:, mask - 1] != 0,
            "mask_words": lax.bitcast_convert_type(buffer[:, mask : mask + self.mask_words], np.uint32),
            "bad_words": words.reshape(-1, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS),
            "logprob_ids": buffer[:, -MAX_LOGPROB_TOKEN_IDS:],
        }


class RowConstraints:
    """One request's constraints, ready to be copied into the buffer."""

    def __init__(self, shape: ConstraintShape, request: AdmittedRequest):
        params = request.params
        banned = {words[0] for words in request.bad_words if len(words) == 1}
        sequences = [words for words in request.bad_words if len(words) > 1]
        self.has_bias = bool(params.logit_bias)
        self.has_bad_words = bool(sequences)
        self.has_logprob_ids = bool(params.logprob_token_ids)
        self.always_masks = bool(banned) or params.allowed_token_ids is not None
        self.min_length = request.num_prompt_tokens + params.min_tokens if request.stop_token_ids else 0
        self._words = shape.empty(1)[0]
        allowed = np.zeros(shape.mask_words * 32, bool)
        allowed[params.allowed_token_ids if params.allowed_token_ids is not None else slice(shape.vocab_size)] = True
        allowed[list(banned)] = False
        self._mask = shape.mask
        self._words[self._mask] = _bits(allowed)
        allowed[list(request.stop_token_ids)] = False
        self._early_mask = _bits(allowed)
        for i, (token, value) in enumerate((params.logit_bias or {}).items()):
            self._words[i] = token
            self._words[MAX_BIASES + i] = np.float32(value).view(np.int32)
        reported = params.logprob_token_ids or []
        self._words[len(self._words) - MAX_LOGPROB_TOKEN_IDS :][: len(reported)] = reported
        table = self._words[self._mask.stop : -MAX_LOGPROB_TOKEN_IDS].reshape(MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS)
        for i, words in enumerate(sequences):
            table[i, MAX_BAD_WORD_TOKENS - len(words) :] = words

    @staticmethod
    def needed(request: AdmittedRequest) -> bool:
        params = request.params
        return bool(
            params.logit_bias or params.allowed_token_ids is not None or request.bad_words
            or (params.min_tokens and request.stop_token_ids) or params.logprob_token_ids
        )  # fmt: skip

    def needs(self, position: int) -> bool:
        """Whether the token at `position` needs any of it."""
        return self.has_bias or self.has_bad_words or self.has_logprob_ids or self.masks(position)

    def masks(self, position: int) -> bool:
        """Whether the mask counts for the token at `position`."""
        return self.always_masks or position < self.min_length

    def write(self, out: np.ndarray, position: int) -> None:
        """Fill one row of the buffer for the token to be sampled at `position`."""
        out[:] = self._words
        out[self._mask.start - 1] = self.masks(position)
        if position < self.min_length:
            out[self._mask] = self._early_mask


def _bits(allowed: np.ndarray) -> np.ndarray:
    return np.packbits(allowed, bitorder="little").view(np.uint32).view(np.int32)
