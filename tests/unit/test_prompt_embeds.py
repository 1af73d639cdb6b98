"""Prompts that are vectors: what is taken and refused, and that the prefix cache knows them by their content."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.engine.cache.block_hash import BlockHasher
from jaxllm.engine.io.pooling_inputs import PoolingReader
from jaxllm.engine.io.prompt_embeds import EmbedsReader
from jaxllm.engine.io.prompts import PreparedPrompt, PromptReader, TokenizationOptions
from jaxllm.engine.request import Request
from jaxllm.tokenization.chat import ChatRenderer

VECTORS = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
HASHER = BlockHasher(4)


def reader(dtype: Any = np.float32) -> PromptReader:
    return PromptReader(None, ChatRenderer(None, None), 100, HASHER, EmbedsReader(4, np.dtype(dtype)))


def read(prompt: Any, options: TokenizationOptions | None = None) -> PreparedPrompt:
    (found,) = reader().read([prompt], options)
    if isinstance(found, ValidationError):
        raise found
    return found


def test_arrays_of_every_kind_are_taken():
    torch = pytest.importorskip("torch")
    given = [
        VECTORS,
        VECTORS.astype(np.float64),
        VECTORS[None],
        VECTORS.tolist(),
        np.asfortranarray(VECTORS),
        jnp.asarray(VECTORS),
        torch.tensor(VECTORS, requires_grad=True),
    ]
    for array in given:
        found = read({"prompt_embeds": array, "prompt": "shown", "cache_salt": "s"})
        assert found.embeds is not None and found.embeds.dtype == np.float32 and found.embeds.flags.c_contiguous
        np.testing.assert_array_equal(found.embeds, VECTORS)
        assert (found.token_ids, found.text, found.cache_salt) == ([0] * 10, "shown", "s")
    halves = VECTORS.astype(jnp.bfloat16)
    for array in (jnp.asarray(halves), torch.tensor(VECTORS).bfloat16(), VECTORS):
        (found,) = reader(jnp.bfloat16).read([{"prompt_embeds": array}])
        assert isinstance(found, PreparedPrompt) and found.embeds is not None and found.embeds.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found.embeds, halves)


def test_the_callers_array_is_not_kept():
    array = VECTORS.copy()
    found = read({"prompt_embeds": array})
    array[:] = 0
    np.testing.assert_array_equal(found.embeds, VECTORS)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt_embeds": VECTORS[:, :3]}, "hidden_size 3 does not match the model's hidden_size 4"),
        ({"prompt_embeds": VECTORS[0]}, r"2D tensor of shape \(num_tokens, hidden_size\); got shape \(4,\)"),
        ({"prompt_embeds": np.stack([VECTORS, VECTORS])}, r"got shape \(2, 10, 4\)"),
        ({"prompt_embeds": VECTORS[:0]}, "The decoder prompt cannot be empty"),
        ({"prompt_embeds": VECTORS.astype(np.int32)}, "dtype int32 is not a floating-point type, cannot safely cast"),
        ({"prompt_embeds": VECTORS > 0}, "dtype bool is not a floating-point type"),
        ({"prompt_embeds": "text"}, r"got shape \(\)"),
        ({"prompt_embeds": [[1.0], [1.0, 2.0]]}, "must be an array of numbers, got list"),
        ({"prompt_embeds": np.where(np.arange(10)[:, None] == 3, np.nan, VECTORS)}, "NaN or infinite.*first in row 3"),
        ({"prompt_embeds": VECTORS.astype(np.float64) * 1e300}, "NaN or infinite in float32, first in row 0"),
        ({"prompt_embeds": VECTORS, "prompt_token_ids": [1]}, "the key 'prompt_token_ids' beside 'prompt_embeds'"),
        ({"prompt_embeds": VECTORS, "prompt": [1]}, "'prompt' beside 'prompt_embeds' must be a text"),
        ({"prompt_embeds": VECTORS, "cache_salt": ""}, "cache_salt must be a non-empty string"),
        ({"prompt_embeds": None}, "must have 'prompt', 'prompt_token_ids', 'prompt_embeds' or 'messages'"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        read(prompt)


def test_an_engine_without_the_argument_names_it():
    plain = PromptReader(None, ChatRenderer(None, None), 100)
    (found,) = plain.read([{"prompt_embeds": VECTORS}])
    assert isinstance(found, ValidationError) and "enable_prompt_embeds=True" in str(found)


def test_vectors_are_cut_as_tokens_are():
    for keep, side, expected in ((3, "left", VECTORS[-3:]), (3, "right", VECTORS[:3]), (20, "left", VECTORS)):
        options = TokenizationOptions(keep=keep, truncation_side=side)
        for found in (
            read({"prompt_embeds": VECTORS}, options),
            *PoolingReader(reader(), None, lower_case=False).read([{"prompt_embeds": VECTORS}], options),
        ):
            assert isinstance(found, PreparedPrompt)
            np.testing.assert_array_equal(found.embeds, expected)
            assert len(found.token_ids) == len(expected)


def hashes(embeds: np.ndarray, outputs: tuple[int, ...] = (), salt: str | None = None) -> list[bytes]:
    """Of all blocks of a request, outputs included, as the scheduler asks for them."""
    prompt = read({"prompt_embeds": embeds} | ({"cache_salt": salt} if salt else {}))
    made_by_reader = list(prompt.block_hashes)
    request = Request("r", prompt.token_ids, SamplingParams(), cache_salt=salt, prompt_embeds=prompt.embeds)
    request.all_token_ids += outputs
    found = HASHER.extend(request, len(request.all_token_ids) // 4)
    assert found[: len(made_by_reader)] == made_by_reader
    fork = request.fork("child", SamplingParams(), 0)
    fork.all_token_ids += outputs
    assert HASHER.extend(fork, len(found)) == found
    return found


def test_blocks_are_shared_by_equal_vectors_alone():
    outputs = (7, 8, 9, 10, 11, 12)
    own = hashes(VECTORS, outputs)
    assert len(own) == 4 and hashes(VECTORS, outputs) == own
    for position, shared in ((0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (9, 2)):
        other = VECTORS.copy()
        other[position, 0] = np.nextafter(other[position, 0], np.float32(9))
        found = hashes(other, outputs)
        assert [a == b for a, b in zip(own, found, strict=True)] == [i < shared for i in range(4)]
    assert not set(hashes(VECTORS, outputs, salt="s")) & set(own)
    assert not set(HASHER.hash_prompt([0] * 10)) & set(own), "its tokens are placeholders"
