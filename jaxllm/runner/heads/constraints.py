"""What some requests ask of the sampler beyond a few numbers: biases, allowed tokens, banned words, tokens that do not
come before others, and tokens whose log-probabilities are wanted.

These are wide (a mask has a bit for every token of the vocabulary), so they travel in a second buffer, and only in
steps where a row needs one. `ConstraintShape` is its layout; `RowConstraints` is one request's part of it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.api.sampling_params import MAX_LOGPROB_TOKEN_IDS
from jaxllm.engine.step import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_BIASES, MAX_END_TOKEN_IDS, AdmittedRequest


@dataclasses.dataclass(frozen=True)
class ConstraintShape:
    """Words of one row: bias ids, bias values, whether the mask counts, the mask, banned sequences, tokens to report,
    and the position before which some tokens are not allowed, with their ids.
    """

    vocab_size: int

    @property
    def mask_words(self) -> int:
        return -(-self.vocab_size // 32)

    @property
    def row_size(self) -> int:
        """A mask and what has a fixed size."""
        return self.early.stop

    @property
    def mask(self) -> slice:
        """The mask among a row's words; the word before it says whether it counts."""
        return slice(2 * MAX_BIASES + 1, 2 * MAX_BIASES + 1 + self.mask_words)

    @property
    def bad_words(self) -> slice:
        return slice(self.mask.stop, self.mask.stop + MAX_BAD_WORDS * MAX_BAD_WORD_TOKENS)

    @property
    def logprob_ids(self) -> slice:
        return slice(self.bad_words.stop, self.bad_words.stop + MAX_LOGPROB_TOKEN_IDS)

    @property
    def early(self) -> slice:
        """The position from which on the tokens behind it are allowed; -1 where there are none."""
        return slice(self.logprob_ids.stop, self.logprob_ids.stop + 1 + MAX_END_TOKEN_IDS)

    def full_mask(self) -> np.ndarray:
        """int32 [mask_words] with the bits of all tokens, and no others."""
        return _bits(np.arange(self.mask_words * 32) < self.vocab_size)

    def empty(self, rows: int) -> np.ndarray:
        """A buffer int32 [rows, row_size] that constrains nothing."""
        buffer = np.zeros((rows, self.row_size), np.int32)
        buffer[:, :MAX_BIASES] = -1
        buffer[:, self.mask.stop :] = -1
        return buffer

    def unpack(self, buffer: jax.Array, positions: jax.Array) -> dict[str, jax.Array]:
        """Fields of a device buffer int32 [R, row_size], by `SamplingBatch`'s names.

        Args:
            positions: i32 [R], of the tokens to be sampled.
        """
        words = lax.bitcast_convert_type(buffer[:, self.mask], np.uint32)
        begins, *early = buffer[:, self.early].T
        ids = jnp.stack(early, axis=1)
        # each id is a bit of its own, so that a sum of them is their union
        ids = jnp.where((positions < begins)[:, None] & (ids >= 0), ids, 32 * self.mask_words)
        bits = jnp.left_shift(jnp.uint32(1), (ids % 32).astype(jnp.uint32))
        too_early = jnp.zeros_like(words).at[jnp.arange(len(words))[:, None], ids // 32].add(bits, mode="drop")
        return {
            "bias_ids": buffer[:, :MAX_BIASES],
            "bias_values": lax.bitcast_convert_type(buffer[:, MAX_BIASES : 2 * MAX_BIASES], np.float32),
            "use_mask": buffer[:, self.mask.start - 1] != 0,
            "mask_words": words & ~too_early,
            "bad_words": buffer[:, self.bad_words].reshape(-1, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS),
            "logprob_ids": buffer[:, self.logprob_ids],
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
        stops = sorted(request.stop_token_ids)
        self._words = shape.empty(1)[0]
        if len(stops) <= MAX_END_TOKEN_IDS:  # where there are more, no launch goes on by itself before `min_tokens`
            self._words[shape.early][: 1 + len(stops)] = [self.min_length, *stops]
        allowed = np.zeros(shape.mask_words * 32, bool)
        allowed[params.allowed_token_ids if params.allowed_token_ids is not None else slice(shape.vocab_size)] = True
        allowed[list(banned)] = False
        self._mask = shape.mask
        self._words[self._mask] = _bits(allowed)
        allowed[stops] = False
        self._early_mask = _bits(allowed)
        for i, (token, value) in enumerate((params.logit_bias or {}).items()):
            self._words[i] = token
            self._words[MAX_BIASES + i] = np.float32(value).view(np.int32)
        reported = params.logprob_token_ids or []
        self._words[shape.logprob_ids][: len(reported)] = reported
        table = self._words[shape.bad_words].reshape(MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS)
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

    def write(self, out: np.ndarray, position: int, *, and_behind: bool) -> None:
        """Fill one row of the buffer for the token to be sampled at `position`, or for that and those behind it."""
        out[:] = self._words
        out[self._mask.start - 1] = self.masks(position)
        if position < self.min_length and not and_behind:
            out[self._mask] = self._early_mask


def _bits(allowed: np.ndarray) -> np.ndarray:
    return np.packbits(allowed, bitorder="little").view(np.uint32).view(np.int32)
