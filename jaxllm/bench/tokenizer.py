"""``jaxllm bench tokenizer`` compares the tokens tokenized per second by different numbers of workers."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxllm.bench import report
from jaxllm.tokenization.load import load_tokenizer
from jaxllm.tokenization.pool import BATCH, TokenizerPool, encode
from jaxllm.weights.resolve import resolve_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run(arguments: argparse.Namespace) -> int:
    """Time one prompt at a time, then batches in pools of each size; print medians and their ratio to one worker."""
    tokenizer = load_tokenizer(resolve_tokenizer(arguments.model))
    texts = random_texts(tokenizer, arguments.num_prompts, arguments.input_len)
    total = sum(len(ids) for ids in encode(tokenizer, texts, special_tokens=False))
    pools = {count: TokenizerPool(count) for count in arguments.workers}
    ways: dict[str, Callable[[], object]] = {"one prompt at a time": lambda: [tokenizer.encode(text) for text in texts]}
    for count, pool in pools.items():
        ways[f"pool of {count}"] = lambda pool=pool: in_pool(pool, tokenizer, texts)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeat):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    for pool in pools.values():
        pool.shutdown()
    rates = {name: total / statistics.median(times) for name, times in seconds.items()}
    base = rates[f"pool of {arguments.workers[0]}"]
    print(f"{len(texts)} prompts, {total} tokens, batches of {BATCH}, medians of {arguments.repeat} alternating runs")
    for name, rate in rates.items():
        print(f"{name:22} {rate:12,.0f} tokens/s {rate / base:6.2f}x")
    report.write(arguments.output_json, arguments, {"tokens": total, "tokens_per_s": rates, "seconds": seconds})
    return 0


def in_pool(pool: TokenizerPool, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokenize as the engine does: batch by batch, every worker busy."""

    def work(batch: list[str]) -> list[list[int]]:
        return encode(tokenizer, batch, special_tokens=False)

    futures = [pool.submit(work, texts[first : first + BATCH]) for first in range(0, len(texts), BATCH)]
    return [ids for future in futures for ids in future.result()]


def random_texts(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[str]:
    """Return texts of about `length` tokens each, made of the vocabulary's own tokens."""
    draw = random.Random(0)
    size = len(tokenizer)
    return [str(tokenizer.decode(draw.sample(range(size), min(length, size)))) for _ in range(count)]
