"""Hashes that name the contents of full blocks, chained, so that one hash stands for a whole prefix.

BLAKE2b with 16 bytes of digest over the parent's digest, the packed token ids and the extra keys: about 1 us a block,
several times faster than pickling the tokens for SHA-256, the same in every process, and still cryptographic, which
matters because a collision would give one user another's keys and values (a birthday attack costs 2**64 hashes).
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from jaxllm.engine.request import Request

DIGEST_BYTES = 16
#: the parent of every first block; fixed, so that hashes agree between processes
NONE_HASH = hashlib.blake2b(b"jaxllm: no parent block", digest_size=DIGEST_BYTES).digest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtraKey:
    """Something besides the token ids that keys and values depend on.

    A LoRA adapter is ``ExtraKey(kind="lora", value=name)`` and holds for every block. An image at positions 5 to 260 is
    ``ExtraKey(kind="mm", value=content_hash, start=5, stop=261)`` and holds for the blocks that it touches.
    """

    kind: str
    value: str | int | bytes
    #: first position; None: the whole request
    start: int | None = None
    #: the position behind the last one
    stop: int | None = None


class BlockHasher:
    """Hashes the full blocks of `block_size` tokens of requests."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        # Little-endian whatever the machine, so that hashes can be compared between machines.
        self._pack = struct.Struct(f"<{block_size}I").pack

    def extend(self, request: Request, num_blocks: int) -> list[bytes]:
        """Make `request.block_hashes` at least `num_blocks` long and return it.

        The request must know at least ``num_blocks * block_size`` tokens, ids in [0, 2**32).
        """
        hashes = request.block_hashes
        if len(hashes) < num_blocks:
            content = request.all_token_ids, request.prompt_embeds
            self._extend(hashes, *content, num_blocks, request.cache_salt, request.extra_keys)
        return hashes

    def hash_prompt(
        self,
        token_ids: list[int],
        cache_salt: str | None = None,
        embeds: np.ndarray | None = None,
        extra_keys: tuple[ExtraKey, ...] = (),
    ) -> list[bytes]:
        """The hashes of a prompt's full blocks, as `extend` makes them for a request.

        Args:
            embeds: [tokens, hidden size], where the prompt is vectors; they are hashed as they are, so that prompts
                share blocks whose vectors are equal to the bit. With a prompt of token ids they share none.
        """
        hashes: list[bytes] = []
        self._extend(hashes, token_ids, embeds, len(token_ids) // self.block_size, cache_salt, extra_keys)
        return hashes

    def _extend(
        self,
        hashes: list[bytes],
        token_ids: list[int],
        embeds: np.ndarray | None,
        num_blocks: int,
        cache_salt: str | None,
        extra_keys: tuple[ExtraKey, ...],
    ) -> None:
        size, pack, blake2b = self.block_size, self._pack, hashlib.blake2b
        plain = cache_salt is None and not extra_keys
        parent = hashes[-1] if hashes else NONE_HASH
        for index in range(len(hashes), num_blocks):
            # Parent and tokens have fixed lengths, and a repr has its own end, so where each part begins is never in
            # doubt.
            packed = parent + pack(*token_ids[index * size : (index + 1) * size])
            if not plain and (keys := self._extra_keys(cache_salt, extra_keys, index)):
                packed += repr(keys).encode()
            if embeds is not None and index * size < len(embeds):
                packed += b"prompt_embeds" + embeds[index * size : (index + 1) * size].tobytes()
            parent = blake2b(packed, digest_size=DIGEST_BYTES).digest()
            hashes.append(parent)

    def _extra_keys(self, cache_salt: str | None, extra_keys: tuple[ExtraKey, ...], index: int) -> tuple[object, ...]:
        """Nested tuples of str, int and bytes, whose `repr` is unambiguous."""
        start = index * self.block_size
        stop = start + self.block_size
        keys: list[object] = []
        for key in extra_keys:
            if key.start is None:
                keys.append((key.kind, key.value))
            elif key.start < stop and (key.stop is None or key.stop > start):
                # Where the content lies in the block matters: the same image one position later is another block.
                keys.append((key.kind, key.value, key.start - start))
        # The chain carries the salt of block 0 to every later block.
        if index == 0 and cache_salt is not None:
            keys.append(("cache_salt", cache_salt))
        return tuple(keys)
