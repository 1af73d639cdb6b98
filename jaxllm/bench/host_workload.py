"""The host is timed with a steady number of running requests; prompts of all kinds come in between."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

from jaxllm.api.sampling_params import RequestOutputKind, SamplingParams

#: tokens that the cycle of prompts is drawn from
_TOKENS = range(1000, 3000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostWorkload:
    """Requests without an end: whenever one finishes, the next one comes.

    Prompts have a uniformly drawn length. One in `long_every` is long: it is computed in chunks, over several steps.
    Of the others, `shared_share` begin with one of a few prefixes, which the prefix cache knows from the second time
    on. Outputs have a uniformly drawn length, and those of the first `concurrency` requests any part of one, so that
    requests end at all times.
    """

    #: requests that run at the same time
    concurrency: int
    prompt_tokens: tuple[int, int] = (32, 256)
    long_every: int = 16
    long_tokens: int = 3000
    shared_share: float = 0.5
    num_prefixes: int = 4
    prefix_tokens: int = 128
    output_tokens: tuple[int, int] = (128, 384)
    #: every step delivers what is new of a request; else it has one output, at its end
    stream: bool = False
    #: of the KV cache; vLLM's
    block_size: int = 16
    seed: int = 0

    @property
    def max_model_len(self) -> int:
        longest = max(self.long_tokens, self.prompt_tokens[1] + self.prefix_tokens)
        return -(-(longest + self.output_tokens[1]) // self.block_size) * self.block_size

    @property
    def num_blocks(self) -> int:
        """Room for all, the long ones among them."""
        longest = self.max_model_len // self.block_size
        return 1 + 2 * longest + self.concurrency * longest // 4

    @property
    def max_num_batched_tokens(self) -> int:
        """Less than a long prompt has, so that it comes in chunks, and enough for what arrives on average."""
        return 2048 + self.concurrency

    def describe(self) -> str:
        low, high = self.prompt_tokens
        text = f"prompts of {low}-{high} tokens"
        if self.shared_share:
            text += f", {self.shared_share:.0%} of them behind one of {self.num_prefixes} prefixes of "
            text += f"{self.prefix_tokens}"
        if self.long_every:
            text += f"; one in {self.long_every} of {self.long_tokens} tokens, in chunks"
        return f"{text}; outputs of {self.output_tokens[0]}-{self.output_tokens[1]} tokens"

    def num_requests(self, steps: int) -> int:
        """Return more than come in so many steps after the first `concurrency` ones run."""
        return 3 * self.concurrency + 2 * self.concurrency * steps // self.output_tokens[0]

    def requests(self) -> Iterator[tuple[list[int], SamplingParams]]:
        """Return token ids of a prompt, and what to do with it."""
        draw = random.Random(self.seed)
        prefixes = [self._tokens(draw, self.prefix_tokens) for _ in range(self.num_prefixes)]
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        for number in itertools.count():
            if self.long_every and number % self.long_every == self.long_every - 1:
                prompt = self._tokens(draw, self.long_tokens)
            else:
                prompt = self._tokens(draw, draw.randint(*self.prompt_tokens))
                if draw.random() < self.shared_share:
                    prompt = prefixes[draw.randrange(self.num_prefixes)] + prompt
            length = draw.randint(*self.output_tokens)
            if number < self.concurrency:
                length = draw.randint(1, length)
            params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, output_kind=kind)
            yield prompt, params

    def _tokens(self, draw: random.Random, count: int) -> list[int]:
        return draw.choices(_TOKENS, k=count)
