"""What sampling should do, in float64 numpy with full sorts, and batches made from plain rows."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.sampling.batch import SamplingBatch
from jaxllm.sampling.sampler import SampleResult, sample


@dataclasses.dataclass(kw_only=True)
class Row:
    """One request's sampling parameters, as a person would write them."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    position: int = 0
    prompt: list[int] = dataclasses.field(default_factory=list)
    outputs: list[int] = dataclasses.field(default_factory=list)
    bias: dict[int, float] = dataclasses.field(default_factory=dict)
    allowed: set[int] | None = None
    bad_words: list[list[int]] = dataclasses.field(default_factory=list)
    logprob_ids: list[int] = dataclasses.field(default_factory=list)


def make_batch(rows: list[Row], vocab: int, *, capacity: int = 8, want_logprobs: bool = True) -> SamplingBatch:
    """The rows as arrays; `capacity` is L. Everything that must not be read is filled with garbage."""
    count = len(rows)
    garbage = np.random.default_rng(count)
    history = garbage.integers(-5, vocab, (count, capacity)).astype(np.int32)
    bias_ids = np.full((count, 4), -1, np.int32)
    bias_values = garbage.normal(size=(count, 4)).astype(np.float32)
    words = garbage.integers(0, 2**32, (count, -(-vocab // 32)), dtype=np.uint64).astype(np.uint32)
    bad_words = np.full((count, 3, 3), -1, np.int32)
    logprob_ids = np.full((count, 4), -1, np.int32)
    for i, row in enumerate(rows):
        tokens = row.prompt + row.outputs
        history[i, : len(tokens)] = tokens
        for j, (token, value) in enumerate(row.bias.items()):
            bias_ids[i, j], bias_values[i, j] = token, value
        if row.allowed is not None:
            words[i] = 0
            for token in row.allowed:
                words[i, token // 32] |= np.uint32(1 << (token % 32))
        for j, word in enumerate(row.bad_words):
            bad_words[i, j, 3 - len(word) :] = word
        logprob_ids[i, : len(row.logprob_ids)] = row.logprob_ids

    def column(name: str, dtype: Any) -> Any:
        return jnp.asarray([getattr(row, name) for row in rows], dtype)

    no = jnp.asarray(False)
    batch = SamplingBatch(
        temperature=column("temperature", jnp.float32),
        top_k=column("top_k", jnp.int32),
        top_p=column("top_p", jnp.float32),
        min_p=column("min_p", jnp.float32),
        repetition_penalty=column("repetition_penalty", jnp.float32),
        presence_penalty=column("presence_penalty", jnp.float32),
        frequency_penalty=column("frequency_penalty", jnp.float32),
        seed=jnp.asarray([[row.seed >> 32, row.seed & 0xFFFFFFFF] for row in rows], jnp.uint32),
        position=column("position", jnp.int32),
        prompt_length=jnp.asarray([len(row.prompt) for row in rows], jnp.int32),
        length=jnp.asarray([len(row.prompt) + len(row.outputs) for row in rows], jnp.int32),
        history=jnp.asarray(history),
        bias_ids=jnp.asarray(bias_ids),
        bias_values=jnp.asarray(bias_values),
        use_mask=jnp.asarray([row.allowed is not None for row in rows]),
        mask_words=jnp.asarray(words),
        bad_words=jnp.asarray(bad_words),
        logprob_ids=jnp.asarray(logprob_ids),
        extra_args=jnp.zeros((count, 0), jnp.float32),
        any_random=no,
        any_truncation=no,
        any_penalty=no,
        any_bias=no,
        any_mask=no,
        any_bad_words=no,
        want_logprobs=jnp.asarray(want_logprobs),
    )
    return batch.with_flags()


def adjusted(logits: np.ndarray, row: Row) -> np.ndarray:
    """float64[V]: mask, bad words (which begin and end in the outputs, as in vLLM), bias, penalties."""
    values = logits.astype(np.float64)
    if row.allowed is not None:
        values[[t for t in range(len(values)) if t not in row.allowed]] = -np.inf
    tokens = row.prompt + row.outputs
    for word in row.bad_words:
        if len(word) == 1 or row.outputs[-(len(word) - 1) :] == word[:-1]:
            values[word[-1]] = -np.inf
    for token, bias in row.bias.items():
        values[token] += bias
    for token in set(tokens):
        value = values[token]
        values[token] = value / row.repetition_penalty if value > 0 else value * row.repetition_penalty
    for token, count in Counter(row.outputs).items():
        values[token] -= row.frequency_penalty * count + row.presence_penalty
    return values


def ranking(logits: np.ndarray) -> np.ndarray:
    """Token ids by descending logit, equal ones by ascending id."""
    return np.argsort(-logits.astype(np.float64), kind="stable")


def log_weights(logits: np.ndarray, temperature: float) -> np.ndarray:
    """float64[V]: log of each probability relative to the largest."""
    values = logits.astype(np.float64)
    peak = values.max()
    with np.errstate(invalid="ignore"):
        return np.where(values == peak, 0.0, values - peak) / temperature


def kept_bounds(logits: np.ndarray, row: Row, tolerance: float = 1e-4) -> tuple[int, int]:
    """Fewest and most tokens of `ranking` that may remain after min_p, top_k, top_p, for borders within `tolerance`."""
    scaled = log_weights(logits, row.temperature)[ranking(logits)]
    bounds = []
    for slack in (-tolerance, tolerance):
        survivors = len(scaled)
        if row.min_p > 0:
            survivors = int((np.exp(scaled) >= row.min_p * (1 - slack)).sum())
        if 0 < row.top_k < len(scaled):
            survivors = min(survivors, row.top_k)
        survivors = max(survivors, 1)
        weights = np.exp(scaled[:survivors])
        if row.top_p < 1:
            before = np.cumsum(weights) - weights
            survivors = max(1, int((before < (row.top_p + slack) * weights.sum()).sum()))
        bounds.append(survivors)
    return bounds[0], bounds[1]


def probabilities(logits: np.ndarray, row: Row) -> np.ndarray:
    """float64[V]: the distribution that a random row draws from."""
    order = ranking(logits)[: kept_bounds(logits, row, 0.0)[1]]
    result = np.zeros(len(logits))
    result[order] = np.exp(log_weights(logits, row.temperature)[order])
    return result / result.sum()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64[V]"""
    values = logits.astype(np.float64)
    peak = values.max()
    return values - peak - np.log(np.exp(values - peak).sum())


@functools.cache
def compiled(num_logprobs: int, mode: str = "raw_logprobs") -> Any:
    return jax.jit(functools.partial(sample, num_logprobs=num_logprobs, logprobs_mode=mode))


def run(
    logits: np.ndarray, rows: list[Row], num_logprobs: int = 5, mode: str = "raw_logprobs", **kw: Any
) -> SampleResult:
    """`sample` of the rows, filled up to 16 greedy ones so that most tests share one compiled program."""
    count, vocab = logits.shape
    filled = np.zeros((max(16, count), vocab), np.float32)
    filled[:count] = logits
    batch = make_batch(rows + [Row()] * (16 - count), vocab, **kw)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], compiled(num_logprobs, mode)(filled, batch))


def normal(rows: int, vocab: int, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (rows, vocab)).astype(np.float32)
