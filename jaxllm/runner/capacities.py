"""Room in compiled programs, rounded up to few steps: engines that differ in a limit alone find each other's programs.

The limits themselves are the scheduler's, and hold as they were given. What is beyond them costs the memory of numbers
that nobody writes, and a step's buffer some words that nobody reads.
"""

from __future__ import annotations

#: rows that there is room for at least, before multiples of `ROW_BLOCK`. A GPU's attention divides its work by them and
#: by the context, and has them closer to what is asked for
ROW_STEPS_CPU = (8, 64)
ROW_STEPS_GPU = (8, 16, 32, 64, 128)
#: logits of so many rows exist at once on a GPU, so that room for more of them costs no block of its own
ROW_BLOCK = 256
#: rows whose logits exist at once on a CPU, which goes on to the next block as long as there are rows. A block costs
#: its size, so few rows take a small one; eight of them are computed together, so that serves a single row as well
SAMPLE_ROWS_CPU = (8, 32)
#: on a CPU there is room for contexts of so many tokens where the model has them, whatever `max_model_len` is
SHARED_CONTEXT = 8192
#: significant bits of the number of blocks that are of use, and what a CPU's pool has at least: so many blocks, if they
#: take no more than so many bytes
BLOCK_BITS = 4
SHARED_BLOCKS, SHARED_BYTES = 64, 128 * 2**20
#: that an array reserves where it takes no memory until it is written
ARRAY_BYTES = 2 * 2**30


def row_capacity(max_num_seqs: int, platform: str) -> int:
    """Return the rows that programs have room for."""
    steps = ROW_STEPS_CPU if platform == "cpu" else ROW_STEPS_GPU
    return next((step for step in steps if step >= max_num_seqs), -(-max_num_seqs // ROW_BLOCK) * ROW_BLOCK)


def context_capacity(max_model_len: int, longest: int, platform: str) -> int:
    """Return the tokens of a row that programs have room for: a power of two up to `SHARED_CONTEXT`, else a multiple of
    it.

    Args:
        longest: the model's own limit.
    """
    if platform == "cpu":
        max_model_len = max(max_model_len, min(longest, SHARED_CONTEXT))
    if max_model_len <= SHARED_CONTEXT:
        return 1 << (max_model_len - 1).bit_length()
    return -(-max_model_len // SHARED_CONTEXT) * SHARED_CONTEXT


def block_capacity(num_blocks: int, block_bytes: int, platform: str) -> int:
    """Return the blocks of a pool of which `num_blocks` are of use: at most an eighth more, or few all the same."""
    if platform == "cpu":
        num_blocks = max(num_blocks, min(SHARED_BLOCKS, SHARED_BYTES // block_bytes))
    step = 1 << max(0, num_blocks.bit_length() - BLOCK_BITS)
    return -(-num_blocks // step) * step


def array_capacity(num_blocks: int, block_bytes: int, machine_bytes: int) -> int:
    """Return the blocks of a CPU's array that takes memory as it is written, of which a pool hands out `num_blocks`: as
    many as any pool of up to `ARRAY_BYTES` has, or of half of the machine's memory, rounded down to a power of two, so
    that machines of about one size find each other's programs.

    Args:
        machine_bytes: as `memory.plan.reservable_memory` says.
    """
    most = min(ARRAY_BYTES, machine_bytes // 2)
    reserved = (1 << most.bit_length()) >> 1
    return max(num_blocks, reserved // block_bytes)
