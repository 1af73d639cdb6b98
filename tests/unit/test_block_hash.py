"""Block hashes: what they depend on, and that they are the same in every process."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.api.sampling_params import SamplingParams
from jaxllm.engine.cache.block_hash import NONE_HASH, BlockHasher, ExtraKey
from jaxllm.engine.io.pooling_inputs import PoolingReader
from jaxllm.engine.io.prompts import PreparedPrompt, PromptReader, TokenizationOptions
from jaxllm.engine.request import Request
from jaxllm.tokenization.chat import ChatRenderer

TOKENS = list(range(20))


def hashes(tokens: list[int], size: int = 4, **kwargs: object) -> list[bytes]:
    request = Request("r", tokens, SamplingParams(), **kwargs)  # type: ignore[arg-type]
    return BlockHasher(size).extend(request, len(tokens) // size)


def block(parent: bytes, tokens: list[int], extra: bytes = b"") -> bytes:
    return hashlib.blake2b(parent + struct.pack("<4I", *tokens) + extra, digest_size=16).digest()


def test_the_chain_is_blake2b_of_parent_and_packed_tokens() -> None:
    parent = NONE_HASH
    for index, found in enumerate(hashes(TOKENS)):
        parent = block(parent, TOKENS[4 * index : 4 * index + 4])
        assert found == parent


def test_the_largest_token_id_fits_and_a_larger_one_does_not() -> None:
    assert len(hashes([2**32 - 1] * 4)) == 1
    with pytest.raises(struct.error):
        hashes([2**32] * 4)


def test_one_token_changes_its_block_and_every_later_one() -> None:
    changed = hashes([*TOKENS[:9], 77, *TOKENS[10:]])
    same = [a == b for a, b in zip(hashes(TOKENS), changed, strict=True)]
    assert same == [True, True, False, False, False]


def test_extending_in_parts_is_the_same_as_at_once() -> None:
    request = Request("r", TOKENS[:10], SamplingParams())
    hasher = BlockHasher(4)
    assert len(hasher.extend(request, 2)) == 2
    request.all_token_ids += TOKENS[10:]
    assert hasher.extend(request, 5) == hashes(TOKENS)
    assert len(hasher.extend(request, 3)) == 5


def test_salts_and_adapters_share_nothing() -> None:
    kinds = [
        hashes(TOKENS),
        hashes(TOKENS, cache_salt="a"),
        hashes(TOKENS, cache_salt="b"),
        hashes(TOKENS, cache_salt=""),
        hashes(TOKENS, extra_keys=(ExtraKey(kind="lora", value="a"),)),
        hashes(TOKENS, extra_keys=(ExtraKey(kind="cache_salt", value="a"), ExtraKey(kind="lora", value="a"))),
    ]
    for index in range(5):
        assert len({kind[index] for kind in kinds}) == len(kinds)


def test_an_image_changes_the_blocks_from_its_first_one_on() -> None:
    plain = hashes(TOKENS)
    image = hashes(TOKENS, extra_keys=(ExtraKey(kind="mm", value=b"cat", start=6, stop=11),))
    later = hashes(TOKENS, extra_keys=(ExtraKey(kind="mm", value=b"cat", start=7, stop=12),))
    other = hashes(TOKENS, extra_keys=(ExtraKey(kind="mm", value=b"dog", start=6, stop=11),))
    assert [a == b for a, b in zip(plain, image, strict=True)] == [True, False, False, False, False]
    assert image[1] != later[1]
    assert image[1] != other[1]


def test_an_image_that_ends_at_a_block_does_not_touch_the_next() -> None:
    """Of two images with one hash chain behind them, only the touched blocks get a key of their own."""
    found = hashes(TOKENS, extra_keys=(ExtraKey(kind="mm", value=b"cat", start=4, stop=8),))
    assert found[2] == block(found[1], TOKENS[8:12])
    assert found[1] == block(found[0], TOKENS[4:8], b"(('mm', b'cat', 0),)")


def test_hashes_are_the_same_in_another_process() -> None:
    code = (
        "from jaxllm.engine.cache.block_hash import *; from jaxllm.engine.request import Request\n"
        "from jaxllm.api.sampling_params import SamplingParams\n"
        "r = Request('r', list(range(8)), SamplingParams(), cache_salt='s')\n"
        "print(BlockHasher(4).extend(r, 2)[1].hex())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == hashes(list(range(8)), cache_salt="s")[1].hex()


@given(
    tokens=st.lists(st.integers(0, 99), min_size=1, max_size=40),
    salt=st.none() | st.text(min_size=1),
    keep=st.none() | st.integers(1, 40),
    side=st.sampled_from(["left", "right"]),
)
def test_a_prompt_that_is_read_has_the_hashes_that_its_request_would_make(
    tokens: list[int], salt: str | None, keep: int | None, side: str
) -> None:
    """However it is cut, for generation and for pooling."""
    hasher = BlockHasher(4)
    reader = PromptReader(None, ChatRenderer(None, None), 100, hasher)
    prompt = {"prompt_token_ids": tokens} | ({"cache_salt": salt} if salt else {})
    options = TokenizationOptions(keep=keep, truncation_side=side)
    for read in (reader.read, PoolingReader(reader, None, lower_case=False).read):
        (found,) = read([prompt], options)
        assert isinstance(found, PreparedPrompt)
        request = Request("r", found.token_ids, SamplingParams(), cache_salt=salt, block_hashes=found.block_hashes)
        assert hasher.extend(request, len(found.token_ids) // 4) == hashes(found.token_ids, cache_salt=salt)
        if len(found.token_ids) == len(tokens):
            assert len(found.block_hashes) == len(tokens) // 4
        assert request.fork("child", SamplingParams(), 0).block_hashes == request.block_hashes
