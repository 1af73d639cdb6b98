"""Stage 5: whole steps of the engine at Llama-3.1-8B's shape, random weights, against what reading the weights and the
cache must take at least. The steps are those of the scheduler's interface, so packing and launching are in them.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gpu_check import records
from gpu_check.model_folder import write_config
from gpu_check.sizes import sizes
from gpu_check.stages import seconds_left
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config.engine_args import engine_args
from jaxllm.engine.engine import Engine
from jaxllm.engine.step import AdmittedRequest, SchedulerOutput
from jaxllm.models.params import Params
from jaxllm.runner.runner import Runner
from jaxllm.startup.start import start

DECODE_TARGET = 0.75
GREEDY = SamplingParams(temperature=0.0, max_tokens=1)
RANDOM = SamplingParams(temperature=0.8, top_p=0.95, top_k=50, max_tokens=1)
#: the one whose step has a target
TARGET_SEQUENCES = 64


def engine_arguments() -> dict[str, Any]:
    """Those of this stage and of the next, whose compiled steps are the same."""
    return {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "enable_prefix_caching": False,
        **sizes().engine,
    }


def main() -> None:
    size = sizes()
    with tempfile.TemporaryDirectory(prefix="gpu-check-model-") as folder:
        began = time.perf_counter()
        started = start(engine_args(write_config(Path(folder), size.model), **engine_arguments()))
        records.fact("start", {"seconds": time.perf_counter() - began, "phases": started.startup_times})
        records.fact("memory plan", str(started.memory_plan).splitlines())
        try:
            _measure(Bench(started))
        finally:
            started.shutdown()


def _measure(bench: Bench) -> None:
    size = sizes()
    for sequences, context in size.decode_steps:
        _attempt(lambda s=sequences, c=context: bench.decode(s, c), f"decode {sequences} x {context}")
    for sequences, context, chunk, at in size.mixed_steps:
        arguments = sequences, context, chunk, at
        _attempt(lambda a=arguments: bench.mixed(*a), f"mixed {arguments}")


def decode_room() -> int:
    """Tokens that every sequence of a decode benchmark gets: whole steps and forward programs, and two to warm up."""
    return 2 + 2 * sizes().repeats * sizes().steps


def _attempt(measure: Callable[[], None], name: str) -> None:
    if seconds_left() < 8:
        records.fact("left out: out of time", name)
        return
    try:
        measure()
    except Exception as error:  # whatever the card says; the next shape may do
        records.check(name, False, f"{type(error).__name__}: {error}"[:1000])


@dataclasses.dataclass(kw_only=True)
class Rows:
    """Requests in the middle of their lives: so many tokens are in the cache, and the next ones are computed."""

    contexts: list[int]
    counts: list[int]
    params: SamplingParams
    #: tokens that are computed in steps to come
    room: int

    def admitted(self, block_size: int) -> list[AdmittedRequest]:
        requests, next_block = [], 1
        for row, (context, count) in enumerate(zip(self.contexts, self.counts, strict=True)):
            blocks = -(-(context + count + self.room) // block_size)
            requests.append(
                AdmittedRequest(
                    row=row,
                    request_id=str(row),
                    token_ids=[1 + (row + i) % 250 for i in range(context + count)],
                    num_prompt_tokens=context + count,
                    num_computed_tokens=context,
                    params=self.params,
                    seed=row,
                    stop_token_ids=frozenset(),
                    block_ids=(list(range(next_block, next_block + blocks)),),
                )
            )
            next_block += blocks
        return requests


class Bench:
    """Times steps of an engine's runner."""

    def __init__(self, started: Engine):
        assert isinstance(started.runner, Runner)
        self.runner, self.plan = started.runner, started.memory_plan
        programs: Any = self.runner.head.programs
        self.model: Any = programs.config.model
        params = self.runner.params
        assert isinstance(params, Params)
        # of the embedding a step reads its tokens' rows alone
        read = params if params.head is None else dataclasses.replace(params, embedding=None)
        self.weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(read))
        self.num_weights = sum(leaf.size for leaf in jax.tree.leaves(read))
        self._fill_cache()

    def _fill_cache(self) -> None:
        """Small random numbers: zeros are easier on the card than what a model writes."""

        def fill(cache: jax.Array) -> jax.Array:
            page = jnp.arange(cache.shape[0], dtype=jnp.uint32)[:, None, None, None]
            lane = jnp.arange(cache.shape[-1], dtype=jnp.uint32)
            mixed = (page * jnp.uint32(2654435761) + lane * jnp.uint32(40503)) >> 7
            # sign and mantissa are mixed, the exponent is that of numbers from an eighth on
            bits = jnp.broadcast_to(mixed.astype(jnp.uint16) & 0x807F | 0x3E00, cache.shape)
            return bits if cache.dtype == jnp.uint16 else jax.lax.bitcast_convert_type(bits, cache.dtype)

        state = self.runner._live()
        self.runner._state = dataclasses.replace(state, cache=jax.jit(fill, donate_argnums=0)(state.cache))

    def decode(self, sequences: int, context: int) -> None:
        """One token of each sequence."""
        # halfway through the steps that are timed
        kv_bytes = self._kv_bytes(sequences * (context + decode_room() // 2))
        sampler_share = {}
        for name, params in (("greedy", GREEDY), ("top-p", RANDOM)):
            times = self._times([context] * sequences, [1] * sequences, params)
            sampler_share[name] = 1 - times["forward"] / times["step"]
            has_target = name == "greedy" and sequences == TARGET_SEQUENCES
            records.measurement(
                "decode step",
                f"{sequences} sequences x {context:,} tokens, {name}",
                times["step"],
                num_bytes=self.weight_bytes + kv_bytes,
                bound="copy",
                target=DECODE_TARGET if has_target else None,
                host_seconds=times["host"],
                forward_seconds=times["forward"],
                sampler_share=sampler_share[name],
            )

    def mixed(self, sequences: int, context: int, chunk: int, at: int) -> None:
        """One token of each sequence, and a chunk of one more's prompt that begins at position `at`."""
        times = self._times([context] * sequences + [at], [1] * sequences + [chunk], GREEDY)
        attended = sequences * context + chunk * at + chunk * (chunk + 1) // 2
        per_token = 2 * 2 * self.model.num_layers * self.model.num_heads * self.model.head_dim
        tokens = sequences + chunk
        head = self.model.vocab_size * self.model.hidden_size
        flops = 2 * (self.num_weights - head) * tokens + 2 * head * (sequences + 1) + per_token * attended
        records.measurement(
            "mixed step",
            f"{sequences} x {context:,} tokens and a chunk of {chunk:,} at {at:,}",
            times["step"],
            num_bytes=self.weight_bytes + self._kv_bytes(sequences * context + at + chunk),
            flops=flops,
            bound="matmul",
            tokens_per_second=tokens / times["step"],
            host_seconds=times["host"],
            forward_seconds=times["forward"],
        )

    def _kv_bytes(self, tokens: int) -> int:
        return tokens * self.plan.kv_cache_bytes // (self.plan.num_blocks * self.plan.block_size)

    def _times(self, contexts: list[int], counts: list[int], params: SamplingParams) -> dict[str, float]:
        """Seconds of a whole step, of its forward program alone, and of the host's part of it."""
        steps, rounds = sizes().steps, sizes().repeats
        is_decode = all(count == 1 for count in counts)
        # decoding goes on from step to step; a chunk is computed again and again
        room = decode_room() if is_decode else 0
        rows = Rows(contexts=contexts, counts=counts, params=params, room=room)
        admitted = rows.admitted(self.plan.block_size)
        blocks = 1 + sum(len(request.block_ids[0]) for request in admitted)
        if blocks > self.plan.num_blocks:
            raise ValueError(f"{blocks} blocks are needed, and the plan has {self.plan.num_blocks}")
        taken = 0

        def step() -> SchedulerOutput:
            nonlocal taken, admitted
            moved = taken if is_decode else 0
            now, admitted, taken = admitted, [], taken + 1
            return SchedulerOutput(
                step=taken,
                admitted=now,
                rows=list(range(len(counts))),
                starts=[context + moved for context in contexts],
                counts=counts,
                wanted=[1] * len(counts),
                new_blocks=[],
                requests=[],
            )

        self.runner.execute(step()).result()
        self.runner.execute(step()).result()
        times: dict[str, list[float]] = {"step": [], "forward": [], "host": []}
        for _ in range(rounds):
            host, start, launched = 0.0, time.perf_counter(), None
            for _ in range(steps):
                scheduled, begun = step(), time.perf_counter()
                launched = self.runner.execute(scheduled)
                host += time.perf_counter() - begun
            assert launched is not None
            launched.result()
            times["step"].append((time.perf_counter() - start) / steps)
            times["host"].append(host / steps)
            start, forward = time.perf_counter(), None
            for _ in range(steps):
                forward = self.runner.forward(step())
            assert forward is not None
            jax.block_until_ready(forward.hidden)
            times["forward"].append((time.perf_counter() - start) / steps)
        return {name: statistics.median(found) for name, found in times.items()}


if __name__ == "__main__":
    main()
