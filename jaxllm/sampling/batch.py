"""What the sampler must know of each row, as one pytree of device arrays."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingBatch:
    """Sampling parameters of R rows over a vocabulary of V tokens.

    L, NB, NW, LW and C are bucket sizes and may be 0, which removes the feature from the program. The scalar flags say
    whether any row needs a feature: the sampler branches on them, so a feature that nobody uses costs nothing at run
    time. `with_flags` computes them; a flag that is True without need only costs time.
    """

    #: f32[R]; 0 = greedy
    temperature: jax.Array
    #: i32[R]; keep the k most likely tokens; 0 or less = all
    top_k: jax.Array
    #: f32[R] in (0, 1]; keep the most likely tokens up to this mass; 1 = all
    top_p: jax.Array
    #: f32[R] in [0, 1]; keep tokens at least this likely relative to the most likely one; 0 = all
    min_p: jax.Array
    #: f32[R] > 0; 1 = off; counts prompt and outputs
    repetition_penalty: jax.Array
    #: f32[R]; 0 = off; counts outputs
    presence_penalty: jax.Array
    #: f32[R]; 0 = off; counts outputs
    frequency_penalty: jax.Array
    #: u32[R, 2]; the request's 64-bit seed as (high word, low word)
    seed: jax.Array
    #: i32[R]; position in the sequence of the token to be sampled
    position: jax.Array
    #: i32[R]; how many tokens of `history` are prompt
    prompt_length: jax.Array
    #: i32[R]; how many tokens of `history` are valid
    length: jax.Array
    #: i32[R, L]; token ids, prompt then outputs; anything from `length` on
    history: jax.Array
    #: i32[R, NB]; token ids whose logit is shifted; -1 = none
    bias_ids: jax.Array
    #: f32[R, NB]; the shift
    bias_values: jax.Array
    #: bool[R]; whether the row's `mask_words` count
    use_mask: jax.Array
    #: u32[R, ceil(V / 32)]; token t is allowed when bit t % 32 of word t // 32 is set
    mask_words: jax.Array
    #: i32[R, NW, LW]; banned sequences, padded with -1 on the left; a sequence of -1 alone is none
    bad_words: jax.Array
    #: i32[R, C]; token ids whose log-probabilities are wanted, besides the most likely ones'; -1 = none
    logprob_ids: jax.Array
    #: f32[R, A]; the extra arguments of the logits processors, in their order
    extra_args: jax.Array
    #: bool[]; some row has a temperature above 0
    any_random: jax.Array
    #: bool[]; some row has a top_k, top_p or min_p
    any_truncation: jax.Array
    #: bool[]; some row has a penalty
    any_penalty: jax.Array
    #: bool[]; some row has a logit bias
    any_bias: jax.Array
    #: bool[]; some row has an allowed-token mask
    any_mask: jax.Array
    #: bool[]; some row has bad words
    any_bad_words: jax.Array
    #: bool[]; somebody reads the log-probabilities of this step
    want_logprobs: jax.Array

    @property
    def penalized(self) -> jax.Array:
        """bool[R]: rows with a penalty that changes something."""
        return (self.repetition_penalty != 1.0) | (self.presence_penalty != 0.0) | (self.frequency_penalty != 0.0)

    @property
    def truncated(self) -> jax.Array:
        """bool[R]: rows whose distribution is cut."""
        return (self.top_k > 0) | (self.top_p < 1.0) | (self.min_p > 0.0)

    def with_flags(self) -> SamplingBatch:
        """The same batch with every `any_*` flag computed from its arrays; `want_logprobs` stays as it is."""
        return dataclasses.replace(self, **self._needs())

    def narrowed(self) -> SamplingBatch:
        """The same batch with those `any_*` flags that are True recomputed; for rows taken out of a larger batch."""
        flags = {name: getattr(self, name) & need for name, need in self._needs().items()}
        return dataclasses.replace(self, **flags)

    def _needs(self) -> dict[str, jax.Array]:
        random = self.temperature > 0.0
        return {
            "any_random": jnp.any(random),
            "any_truncation": jnp.any(random & self.truncated),
            "any_penalty": jnp.any(self.penalized),
            "any_bias": jnp.any(self.bias_ids >= 0),
            "any_mask": jnp.any(self.use_mask),
            "any_bad_words": jnp.any(self.bad_words >= 0),
        }
