"""Compiled steps: every bucket ahead of time, in threads, kept for the next start."""

from __future__ import annotations

import abc
import concurrent.futures
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxllm.api.logits_processor import extra_arg_defaults
from jaxllm.models.decoder import Params
from jaxllm.parallel.mesh import OneAtATime, on_each_device
from jaxllm.parallel.rules import CACHE
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.compile.store import ProgramStore, open_store
from jaxllm.runner.decode_steps import decode_steps
from jaxllm.runner.heads.constraints import ConstraintShape
from jaxllm.runner.memory import freed_memory
from jaxllm.runner.one_row import with_head_for_one, with_whole_layers
from jaxllm.runner.packing import decode_packing, forward_packing, sample_packing
from jaxllm.runner.step import State, StepConfig, forward_step, sample_step, score_step, write_tokens

logger = logging.getLogger("jaxllm")

#: XLA:CPU widens bf16 operands of the products it cannot do natively. Its loop-invariant code motion then lifts the
#: widening of *all* stacked layers out of the scan: a float32 copy of the weights every step (measured: 9x slower at
#: 8 rows, 432 MB more). LLVM's expensive passes take a seventh of the compile time and make no step faster.
CPU_OPTIONS: dict[str, str | bool] = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
    "xla_llvm_disable_expensive_passes": True,
}
#: Besides, of programs without layers, whose time is the product with the head: XLA's older code generator compiles
#: them twice as fast (forward steps would run 10% slower). JAX 0.11 has it no more.
CPU_HEAD_OPTIONS: dict[str, str | bool] = {}
if jax.__version_info__ < (0, 11):
    CPU_HEAD_OPTIONS["xla_cpu_use_fusion_emitters"] = False
#: XLA:GPU computes things again rather than keep them when it believes that memory does not suffice. It does not know
#: that kernels write the KV cache in place, and counts a cache more than there is: with separate layers it repeated the
#: product of queries, keys and values in each (measured: 21 launches a layer instead of 15). What fits is planned here.
GPU_OPTIONS: dict[str, str | bool] = {"xla_disable_hlo_passes": "rematerialization"}

#: rows whose logits exist at once; a block costs its size, so few rows take a small one (on a CPU, which computes eight
#: of them together, the smallest serves a single row as well). For more rows than the largest a GPU has samplers of
#: several blocks, a CPU goes on to the next block as long as there are rows
SAMPLE_ROWS_CPU = (8, 32)
SAMPLE_ROWS_GPU = (8, 64, 256)

#: what a program does, then for which shapes
Key = tuple[Any, ...]
WRITER: Key = ("write tokens",)
SCORER: Key = ("score",)
#: programs that have the head and no layers
HEAD_PROGRAMS = ("sample", "score")
ALLOCATOR: Key = ("allocate",)
#: tokens that one launch of it carries
WRITE_TOKENS = 1024


class Compiler(abc.ABC):
    """Compiles programs ahead of time and keeps them. Asking for one that was not compiled is an error, never a silent
    compile.

    Args:
        params: a tree of `jax.ShapeDtypeStruct` with shardings, of the weights.
        state: such a tree, of what lives on the device between steps.
        cache_dir: where compiled programs are kept, unless JAX is configured to keep them; None: nowhere else.
        source: what the programs are made from, besides their keys.
    """

    def __init__(self, params: Any, state: Any, *, platform: str, cache_dir: Path | None, source: Any):
        self._state, self._params = state, params
        self.param_shardings = jax.tree.map(lambda shape: shape.sharding, params)
        #: of what every device has whole
        self.sharding: jax.sharding.Sharding = jax.tree.leaves(state)[0].sharding
        #: None: there is one device
        self._mesh: jax.sharding.Mesh | None = None
        if isinstance(self.sharding, jax.sharding.NamedSharding):
            assert isinstance(self.sharding.mesh, jax.sharding.Mesh)
            self._mesh = self.sharding.mesh
            self.sharding = jax.sharding.NamedSharding(self._mesh, jax.P())
        self._runs_alone = platform == "cpu" and self._mesh is not None
        self._options = CPU_OPTIONS if platform == "cpu" else GPU_OPTIONS
        self._head_options = CPU_HEAD_OPTIONS if platform == "cpu" else {}
        self._workers = 1 if platform == "cpu" else os.cpu_count()
        self._cache_dir, self._source = cache_dir, source
        self._compiled: dict[Key, jax.stages.Compiled] = {}

    def _lowered(self, function: Callable[..., Any], *args: Any, donate: int | None = None, out: Any = None) -> Any:
        """`function` of `args` (trees of `jax.ShapeDtypeStruct`), lowered.

        Args:
            donate: the argument that is donated.
            out: how the results are split over the mesh, where not each device has all of them.
        """
        spread = on_each_device(function, self._mesh, args, jax.P() if out is None else out)
        return lowered(spread, *args, donate=donate)

    def lower_allocator(self) -> jax.stages.Lowered:
        def zeros() -> Any:
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self._state)

        return jax.jit(zeros, out_shardings=jax.tree.map(lambda s: s.sharding, self._state)).lower()

    def allocate(self) -> Any:
        """The state, zeroed, each device's part in its place."""
        self._compile((ALLOCATOR,), progress=False)
        return self._get(ALLOCATOR)()

    def _words(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=self.sharding)

    def _needed_bytes(self, key: Key) -> int:
        """Temporaries and outputs of a compiled program."""
        memory = self._compiled[key].memory_analysis()
        if memory is None:
            raise RuntimeError("the compiler gives no memory analysis on this platform; pass num_gpu_blocks_override")
        return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

    @functools.cached_property
    def _store(self) -> ProgramStore | None:
        devices = sorted(self.sharding.device_set, key=lambda device: device.id)
        if self._mesh is not None:
            devices = list(self._mesh.devices.flat)
        return open_store(self._cache_dir, devices, self._options, self._source)

    def _compile(self, keys: Iterable[Key], progress: bool) -> None:
        """Tracing is serial (it holds the interpreter), compiling and loading run beside it in threads.

        On a CPU in one: XLA shares a compilation out by itself, and two at once take longer than one after the other,
        and twice the memory.
        """
        store, missing = self._store, [key for key in keys if key not in self._compiled]
        bar = tqdm(total=len(missing), desc="Compiling steps", unit="program", disable=not progress, leave=False)
        with bar, concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
            if store is not None:

                def found(key: Key) -> jax.stages.Compiled | None:
                    program = store.find(key)
                    freed_memory.give_back()
                    return program

                for key, program in zip(missing, pool.map(found, missing), strict=True):
                    if program is not None:
                        self._compiled[key] = program
                        bar.update()
                missing = [key for key in missing if key not in self._compiled]
            if not missing:
                return
            logger.info("Compiling %d programs, or loading those that the compile cache has", len(missing))

            def compiled(key: Key, program: jax.stages.Lowered) -> jax.stages.Compiled:
                own = self._head_options if key[0] in HEAD_PROGRAMS else {}
                if store is None:
                    result = program.compile({**self._options, **own})
                else:
                    result = store.compile(key, program, own)
                freed_memory.give_back()
                return result

            futures = {pool.submit(compiled, key, self._lower(key)): key for key in missing}
            for future in concurrent.futures.as_completed(futures):
                self._compiled[futures[future]] = future.result()
                bar.update()

    @abc.abstractmethod
    def _lower(self, key: Key) -> jax.stages.Lowered:
        """The program of a key, ready to be compiled."""

    def _get(self, key: Key) -> Any:
        """A `jax.stages.Compiled`, or what is called as one."""
        try:
            compiled = self._compiled[key]
            return OneAtATime(compiled) if self._runs_alone else compiled
        except KeyError:
            raise RuntimeError(f"the program for {key} was not compiled ahead of time; please report this") from None


class Programs(Compiler):
    """The compiled programs of one engine: a forward step for every bucket, sampling for a few sizes of block."""

    def __init__(
        self,
        config: StepConfig,
        buckets: tuple[Bucket, ...],
        table_width: int,
        params: Params,
        state: State,
        *,
        platform: str,
        eager: bool,
        cache_dir: Path | None,
        num_decode_steps: int = 1,
        decode_buckets: tuple[Bucket, ...] = (),
    ):
        """
        Args:
            params, state: trees of `jax.ShapeDtypeStruct` with shardings.
            num_decode_steps: most steps of one launch of a program for several.
            decode_buckets: those that have such programs.
            eager: one sampler instead of one for each size of block.
            cache_dir: see `Compiler`.
        """
        made_from = (config, buckets, table_width, params, state, eager, num_decode_steps, decode_buckets)
        super().__init__(params, state, platform=platform, cache_dir=cache_dir, source=made_from)
        if platform != "cpu":
            config = dataclasses.replace(config, fixed_sample_rows=SAMPLE_ROWS_GPU[-1])
        self.config = config
        #: whether a single row has products of its own (`one_row`)
        self.has_one_row_products = platform == "cpu" and self._mesh is None and not config.backend.deterministic
        self.packings = {
            b: forward_packing(b, len(config.groups), table_width, config.max_scored_tokens) for b in buckets
        }
        self.num_decode_steps = num_decode_steps
        self.decode_packings = {
            b: decode_packing(b, len(config.groups), table_width, config.max_scored_tokens) for b in decode_buckets
        }
        self.max_num_seqs = state.tokens.shape[0] - 1
        self.sample_packing = sample_packing(self.max_num_seqs, len(extra_arg_defaults(config.processors)))
        sizes = SAMPLE_ROWS_CPU if platform == "cpu" else (buckets[0].seqs, *SAMPLE_ROWS_GPU)
        self._sample_rows = sorted({min(size, self.max_num_seqs) for size in sizes})
        while platform != "cpu" and self._sample_rows[-1] < self.max_num_seqs:
            self._sample_rows.append(min(2 * self._sample_rows[-1], self.max_num_seqs))
        if eager:
            self._sample_rows = self._sample_rows[-1:]
        #: whether samplers are whole; a GPU also gets greedy-only ones, whose launches never wait for a branch
        self._variants = (True,) if platform == "cpu" or config.processors else (True, False)

    def lower_forward(self, bucket: Bucket) -> jax.stages.Lowered:
        packing = self.packings[bucket]
        function = functools.partial(forward_step, self.config, bucket, packing)
        words = self._words(packing.size + self.sample_packing.size)
        out = State(cache=CACHE, tokens=jax.P()), jax.P(), jax.P()  # pyright: ignore[reportArgumentType]
        return self._lowered(function, self._params_for(bucket), self._state, words, donate=1, out=out)

    def takes_whole_layers(self, bucket: Bucket) -> bool:
        """Whether a bucket's programs take `one_row.with_whole_layers` of the params."""
        return bucket.tokens == 1 and self.has_one_row_products

    def _params_for(self, bucket: Bucket) -> Params:
        return with_whole_layers(self._params) if self.takes_whole_layers(bucket) else self._params

    def head_params(self, params: Params) -> Params:
        """What sampling takes of the weights: few arguments make quick launches.

        Args:
            params: arrays, or their shapes.
        """
        params = dataclasses.replace(params, layers=None, norm=None)
        return with_head_for_one(params) if self.has_one_row_products else params

    def lower_sampler(self, rows: int, full: bool) -> jax.stages.Lowered:
        packing = self.sample_packing
        function = functools.partial(sample_step, self.config, rows, packing)
        hidden = self._hidden(self.max_num_seqs)
        head = self.head_params(self._params)
        words = self._words(packing.size)
        return self._lowered(function, head, self._state.tokens, hidden, words, self._constraints(full), donate=1)

    def _constraints(self, full: bool) -> jax.ShapeDtypeStruct | None:
        shape = ConstraintShape(self.config.model.vocab_size)
        return self._words(self.max_num_seqs, shape.row_size) if full else None

    def lower_decode_steps(self, bucket: Bucket, full: bool) -> jax.stages.Lowered:
        packing, sample_packing = self.decode_packings[bucket], self.sample_packing
        rows = self._sampler_rows(bucket.seqs)
        function = functools.partial(
            decode_steps, self.config, self.num_decode_steps, rows, bucket, packing, sample_packing
        )
        words = self._words(packing.size + sample_packing.size)
        out = State(cache=CACHE, tokens=jax.P()), jax.P()  # pyright: ignore[reportArgumentType]
        params = self._params_for(bucket)
        return self._lowered(function, params, self._state, words, self._constraints(full), donate=1, out=out)

    def lower_scorer(self) -> jax.stages.Lowered:
        capacity = self.config.max_scored_tokens
        function = functools.partial(score_step, self.config, self._sample_rows[-1])
        hidden = self._hidden(capacity)
        return self._lowered(function, self.head_params(self._params), hidden, self._words(1 + capacity))

    def lower_writer(self) -> jax.stages.Lowered:
        return self._lowered(write_tokens, self._state.tokens, self._words(3 + WRITE_TOKENS), donate=0)

    def _hidden(self, rows: int) -> jax.ShapeDtypeStruct:
        size = (rows, self.config.model.hidden_size)
        return jax.ShapeDtypeStruct(size, self._params.embedding.dtype, sharding=self.sharding)

    def activation_bytes(self) -> int:
        """Temporaries and outputs of the largest programs, which are compiled for it and kept."""
        keys: tuple[Key, ...] = (("forward", self.largest), ("sample", self._sample_rows[-1], True), SCORER)
        if self.decode_packings:
            keys = (*keys, ("decode steps", next(reversed(self.decode_packings)), True))
        self._compile((*keys, ALLOCATOR), progress=False)
        return max(self._needed_bytes(key) for key in keys)

    def compile_all(self, progress: bool) -> None:
        """Compile what is missing."""
        samplers = [("sample", rows, full) for rows in self._sample_rows for full in self._variants]
        forwards = [("forward", bucket) for bucket in self.packings]
        several = [("decode steps", bucket, full) for bucket in self.decode_packings for full in self._variants]
        self._compile((*several, *samplers, SCORER, *forwards, WRITER), progress)

    def _lower(self, key: Key) -> jax.stages.Lowered:
        lower = {
            "forward": self.lower_forward,
            "sample": self.lower_sampler,
            "decode steps": self.lower_decode_steps,
            "score": self.lower_scorer,
            "write tokens": self.lower_writer,
            "allocate": self.lower_allocator,
        }
        return lower[key[0]](*key[1:])

    def forward(self, bucket: Bucket) -> jax.stages.Compiled:
        return self._get(("forward", bucket))

    def sampler(self, num_samples: int, full: bool) -> tuple[jax.stages.Compiled, bool]:
        """The sampler for a step, and whether it takes constraints; `full` when a row needs more than its most likely
        token.
        """
        full = full or False not in self._variants
        return self._get(("sample", self._sampler_rows(num_samples), full)), full

    def _sampler_rows(self, num_samples: int) -> int:
        return next((rows for rows in self._sample_rows if rows >= num_samples), self._sample_rows[-1])

    def decode_steps(self, bucket: Bucket, full: bool) -> tuple[jax.stages.Compiled, bool]:
        """The program for several steps, and whether it takes constraints, as `sampler`."""
        full = full or False not in self._variants
        return self._get(("decode steps", bucket, full)), full

    @property
    def scorer(self) -> jax.stages.Compiled:
        return self._get(SCORER)

    @property
    def writer(self) -> jax.stages.Compiled:
        return self._get(WRITER)

    @property
    def largest(self) -> Bucket:
        return next(reversed(self.packings))


def lowered(function: Callable[..., Any], *args: Any, donate: int | None = None) -> jax.stages.Lowered:
    """`function` of `args` (trees of `jax.ShapeDtypeStruct`), lowered; `donate`: the argument that is donated.

    Arguments that are not used are kept: which they are does not show in a lowered program's text, by which it is
    found again.
    """
    return jax.jit(function, donate_argnums=() if donate is None else (donate,), keep_unused=True).lower(*args)
