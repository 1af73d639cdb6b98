"""Compiled steps: every bucket ahead of time, in threads, kept for the next start."""

from __future__ import annotations

import abc
import concurrent.futures
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.api.errors import JaxLLMError
from jaxllm.models.adapters import Stacks, with_adapters
from jaxllm.models.offloaded import lies_on_host
from jaxllm.models.params import Params
from jaxllm.models.vision import VisionParams
from jaxllm.parallel.mesh import DATA, OneAtATime, on_each_device, own_rows
from jaxllm.runner.adapter_stacks import write_adapter
from jaxllm.runner.buckets import Bucket, pick_bucket
from jaxllm.runner.compile import identity
from jaxllm.runner.compile.block_copies import GATHER, SCATTER, BlockCopies
from jaxllm.runner.compile.compiler_options import (
    CPU_FIRST_OPTIONS,
    CPU_HEAD_OPTIONS,
    CPU_OPTIONS,
    GPU_COPY_OPTIONS,
    GPU_OPTIONS,
)
from jaxllm.runner.compile.encoder import ENCODE, EncoderPrograms, Normalization
from jaxllm.runner.compile.progress import StartProgress
from jaxllm.runner.compile.store import ProgramStore, open_store
from jaxllm.runner.compile.workers import Workers
from jaxllm.runner.memory import freed_memory
from jaxllm.runner.packing import Packing
from pallas_kernels.cpu_ffi import compiled as cpu_ffi
from pallas_kernels.cpu_ffi.untouched import is_large, untouched

#: what a program does, then for which shapes
Key = tuple[Any, ...]
#: a sampler that others replace
FIRST_SAMPLE = "first sample"
#: programs that have the head and no layers
HEAD_PROGRAMS = ("sample", "score", FIRST_SAMPLE)
ALLOCATOR: Key = ("allocate",)
ADAPTER_WRITER: Key = ("write adapter",)


class KeptProgram(NamedTuple):
    """A program in the compile cache."""

    #: what it does, then for which shapes
    name: str
    #: of its file; None: it is not kept, or is not found without being traced
    num_bytes: int | None
    #: by this process; False: an earlier one had kept it
    compiled: bool


class Programs(abc.ABC):
    """The compiled programs of one engine, made ahead of time and kept. Asking for one that was not compiled is an
    error, never a silent compile.

    Args:
        packings: of each bucket the fields that its program reads; the last is the largest.
        state: a tree of `jax.ShapeDtypeStruct` with shardings, of what lives on the device between steps.
        cache_dir: where compiled programs are kept, unless JAX is configured to keep them; None: nowhere else.
        source: what the programs are made from, besides their keys.
        spare_bytes: of the state, what nobody ever writes and takes no memory.
        adapters: shapes of the stacks of adapters, with their shardings; None: there are none.
        copied_layers: of each block of the cache, where blocks are copied out of it and into it; 0: they are not.
        progress: told how far compiling is; None: nobody is.
    """

    #: shapes of the weights, with their shardings
    _params: Any
    #: what steps are compiled for, besides their buckets
    config: Any

    def __init__(
        self,
        packings: dict[Bucket, Packing],
        state: Any,
        *,
        platform: str,
        cache_dir: Path | None,
        source: Any,
        spare_bytes: int = 0,
        copied_layers: int = 0,
        progress: StartProgress | None = None,
        adapters: Stacks | None = None,
    ):
        self.adapters = adapters
        self.packings, self._state, self.spare_bytes = packings, state, spare_bytes
        #: of what a step brings and gives: every device has it whole, of copies of the model that step together those
        #: of a copy
        self.sharding: jax.sharding.Sharding = jax.tree.leaves(state)[0].sharding
        #: None: there is one device
        self._mesh: jax.sharding.Mesh | None = None
        #: copies of the model that step together: what each brings and gives lies one behind the other
        self.replicas = 1
        if isinstance(self.sharding, jax.sharding.NamedSharding):
            assert isinstance(self.sharding.mesh, jax.sharding.Mesh)
            self._mesh = self.sharding.mesh
            self.replicas = self._mesh.shape.get(DATA, 1)
            self.sharding = jax.sharding.NamedSharding(self._mesh, own_rows(self._mesh))
        self._runs_alone = platform == "cpu" and self._mesh is not None
        self._on_cpu = platform == "cpu"
        self._head_options = CPU_HEAD_OPTIONS if platform == "cpu" else {}
        self._workers = 1 if platform == "cpu" else os.cpu_count() or 1
        self._cache_dir, self._source = cache_dir, source
        self._progress = progress or StartProgress(quiet=True)
        self._compiled: dict[Key, jax.stages.Compiled] = {}
        self.block_copies: BlockCopies | None = None
        if copied_layers:
            self.block_copies = BlockCopies(copied_layers, state.cache, self._words, self._lowered)
        #: of the tower that sees pictures, and shapes of its weights; None: there is none
        self.encoder: EncoderPrograms | None = None
        self._vision: VisionParams | None = None
        #: whether an earlier start has kept all the programs that were asked for until now
        self.were_found = True
        #: those of the keys that steps do without until they are made beside them
        self.late: tuple[Key, ...] = ()
        self._buckets = tuple(packings)
        self._settings = identity.settings()

    def _with_encoder(self, params: Params, buckets: tuple[int, ...], normal: Normalization) -> Params:
        """Take the tower out of the weights' shapes, for programs of its own: few arguments make quick launches.

        Args:
            buckets: patches of these programs.
            normal: what they take of pixels.
        """
        self._vision = params.vision
        if params.vision is not None:
            self.encoder = EncoderPrograms(
                self.config.context,
                self.config.model.vision,
                normal,
                buckets,
                params.vision,
                self._state.encoded,
                self._rows,
                self._words,
                self._lowered,
            )
        return dataclasses.replace(params, vision=None)

    def _lowered(self, function: Callable[..., Any], *args: Any, donate: int | None = None, out: Any = None) -> Any:
        """`function` of `args` (trees of `jax.ShapeDtypeStruct`), lowered.

        Args:
            donate: the argument that is donated.
            out: how the results are split over the mesh, where not each device has all of them.
        """
        spread = on_each_device(function, self._mesh, args, own_rows(self._mesh) if out is None else out)
        return lowered(spread, *args, donate=donate)

    @property
    def _state_specs(self) -> Any:
        """How the state is split over the mesh."""
        return jax.tree.map(lambda shape: getattr(shape.sharding, "spec", jax.P()), self._state)

    def lower_allocator(self) -> jax.stages.Lowered:
        kernel = self._untouched

        def array(shape: jax.ShapeDtypeStruct) -> jax.Array:
            return untouched(kernel, shape) if kernel and is_large(shape) else jnp.zeros(shape.shape, shape.dtype)

        def zeros() -> Any:
            return jax.tree.map(array, self._state)

        return jax.jit(zeros, out_shardings=jax.tree.map(lambda s: s.sharding, self._state)).lower()

    @property
    def _untouched(self) -> str:
        """`Backend.cpu_untouched`, where one device has all of the state."""
        return self.config.context.backend.cpu_untouched if self._mesh is None else ""

    @property
    def cache_grows(self) -> bool:
        """Whether the cache takes memory as it is written, and not at the start."""
        return bool(self._untouched) and any(map(is_large, jax.tree.leaves(self._state)))

    def lower_adapter_writer(self) -> jax.stages.Lowered:
        assert self.adapters is not None

        def one(shape: jax.ShapeDtypeStruct, slots: int) -> jax.ShapeDtypeStruct:
            """Without the axis of slots."""
            sharding: Any = shape.sharding
            if isinstance(sharding, jax.sharding.NamedSharding):
                axes = tuple(sharding.spec)
                own = jax.P(*axes[:slots], *axes[slots + 1 :])
                sharding = jax.sharding.NamedSharding(sharding.mesh, own)
            sizes = *shape.shape[:slots], *shape.shape[slots + 1 :]
            return jax.ShapeDtypeStruct(sizes, shape.dtype, sharding=sharding)

        out = jax.tree.map(lambda shape: getattr(shape.sharding, "spec", jax.P()), self.adapters)
        layers = jax.tree.map(functools.partial(one, slots=1), self.adapters.layers)
        tables = jax.tree.map(functools.partial(one, slots=0), self.adapters.tables)
        new, slot = Stacks(layers, tables), self._words(1)
        return self._lowered(write_adapter, self.adapters, new, slot, donate=0, out=out)

    @property
    def adapter_writer(self) -> jax.stages.Compiled:
        return self._get(ADAPTER_WRITER)

    def with_adapters(self, params: Any, bucket: Bucket) -> Any:
        """The weights, or their shapes, as a bucket's program takes them.

        Args:
            params: shapes of them, in any form.
        """
        return with_adapters(params, self.adapters) if bucket.adapters and self.adapters is not None else params

    def allocate(self) -> Any:
        """The state, zeroed, each device's part in its place."""
        self._compile((ALLOCATOR,))
        return self._get(ALLOCATOR)()

    def embeddings(self, bucket: Bucket) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The argument of a forward program that brings vectors of prompts; () where the engine takes none."""
        if not self.config.prompt_embeds:
            return ()
        return (
            self._rows(getattr(self._params, "body", self._params).dtype, bucket.tokens, self.config.model.hidden_size),
        )

    def _rows(self, dtype: Any, count: int, *shape: int) -> jax.ShapeDtypeStruct:
        """What a step brings or gives: `count` rows of a shape, of each replica."""
        return jax.ShapeDtypeStruct((self.replicas * count, *shape), dtype, sharding=self.sharding)

    def _words(self, count: int, *shape: int) -> jax.ShapeDtypeStruct:
        return self._rows(np.int32, count, *shape)

    def _needed_bytes(self, key: Key) -> int:
        """Temporaries and outputs of a compiled program."""
        memory = self._compiled[key].memory_analysis()
        if memory is None:
            raise RuntimeError("the compiler gives no memory analysis on this platform; pass num_gpu_blocks_override")
        return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

    @functools.cached_property
    def _options(self) -> dict[str, str | bool]:
        """Of the compiler, for all programs."""
        if self._on_cpu:
            return CPU_OPTIONS
        copies = any(map(lies_on_host, getattr(self._params, "body", self._params).layers))
        return {**GPU_OPTIONS, **(GPU_COPY_OPTIONS if copies else {})}

    @functools.cached_property
    def _store(self) -> ProgramStore | None:
        devices = sorted(self.sharding.device_set, key=lambda device: device.id)
        if self._mesh is not None:
            devices = list(self._mesh.devices.flat)
        return open_store(self._cache_dir, devices, self._options, self._source)

    def _compile(self, keys: Iterable[Key], late: Collection[Key] = ()) -> None:
        """Tracing is serial (it holds the interpreter), compiling and loading run beside it in threads.

        On a CPU in one: XLA shares a compilation out by itself, and two at once take longer than one after the other,
        and twice the memory.

        Args:
            late: those that are loaded, and not compiled.
        """
        store, missing = self._store, [key for key in dict.fromkeys(keys) if key not in self._compiled]
        if not missing:
            return
        total, unknown = self.counts()
        self._progress.begin(total, unknown)

        def found(key: Key) -> jax.stages.Compiled | None:
            assert store is not None
            if store.has(key):  # what is to be traced does not wait for kernels
                cpu_ffi.finish()
            program = store.find(key)
            freed_memory.give_back()
            return program

        with Workers(self._workers, "compile") as pool:
            if store is not None:
                self._collect({pool.submit(found, key): key for key in missing}, total)
            futures: dict[concurrent.futures.Future[Any], Key] = {}
            for key in missing:
                if key not in self._compiled and key not in late:
                    self.were_found = False
                    self._progress.check()
                    futures[pool.submit(self._compile_lowered, key, self._lower(key))] = key
                    self._say(futures, total)
            self._collect(futures, total)

    def _compile_lowered(self, key: Key, program: Any) -> jax.stages.Compiled:
        """A program that was lowered (`jax.stages.Lowered`, or what does what that does)."""
        own = self._head_options if key[0] in HEAD_PROGRAMS else {}
        if key[0] == FIRST_SAMPLE:
            own = {**own, **CPU_FIRST_OPTIONS}
        cpu_ffi.finish(program.as_text)
        store = self._store
        result = program.compile({**self._options, **own}) if store is None else store.compile(key, program, own)
        freed_memory.give_back()
        if self._on_cpu:  # where the most memory that a start takes counts, and one program is compiled at a time
            freed_memory.give_back_code()
        return result

    def counts(self) -> tuple[int, int | None]:
        """How many programs a start waits for, and how many of them no earlier start has kept; None: nobody knows."""
        everything, store = {*self._all_keys(), ALLOCATOR}, self._store
        if store is None:
            return len(everything), None
        missing = {key for key in everything if not store.has(key)}
        late = missing.intersection(self._replaceable())
        return len(everything) - len(late), len(missing) - len(late)

    def kept(self) -> list[KeptProgram]:
        """All programs, once they are compiled, as they are kept for the next start; [] where JAX keeps them."""
        store = self._store
        if store is None:
            return []
        return [
            KeptProgram(_key_text(key), store.size(key), compiled=key in store.compiled)
            for key in (ALLOCATOR, *self._all_keys())
        ]

    def _collect(
        self, futures: Mapping[concurrent.futures.Future[jax.stages.Compiled | None], Key], total: int
    ) -> None:
        """Take the programs as they come, where there are any."""
        for future in self._progress.wait(futures, lambda: self._say((), total)):
            program = future.result()
            if program is not None:
                self._compiled[futures[future]] = program

    def _say(self, futures: Iterable[concurrent.futures.Future[Any]], total: int) -> None:
        """Say how far it is, with so many futures that nobody has collected yet."""
        self._progress.programs(len(self._compiled) + sum(future.done() for future in futures), total)

    def activation_bytes(self) -> int:
        """Temporaries and outputs of the largest programs, which are compiled for it and kept. Where a start waits for
        few programs, the others of these are begun, too: one is traced while another is compiled, and the plan hardly
        ever changes them.
        """
        largest, replaceable = self._largest(), self._replaceable()
        self._compile((*itertools.chain(*largest), ALLOCATOR, *(self._all_keys() if replaceable else ())), replaceable)
        return max(sum(map(self._needed_bytes, keys)) for keys in largest)

    def encoder_activation_bytes(self) -> int | None:
        """Of the program that encodes the largest picture, once it is compiled; None: there is none."""
        key = None if self.encoder is None else self.encoder.keys[-1]
        return self._needed_bytes(key) if key in self._compiled else None

    def compile_all(self) -> None:
        """Compile what is missing."""
        self._compile(self._all_keys())

    def compile_first(self) -> None:
        """Load what an earlier start has kept, and compile what no other program can stand in for; `late` is the
        rest.
        """
        replaceable = self._replaceable()
        self._compile(self._all_keys(), replaceable)
        self._do_without(tuple(key for key in replaceable if key not in self._compiled))

    def compile_late(self, key: Key, beside: Callable[[jax.stages.Lowered], Any]) -> None:
        """Make one of those that are late, in whatever thread, and let steps have it from here on.

        Args:
            beside: what is lowered -> the same, to be compiled at low priority.

        Raises:
            JaxLLMError: JAX's settings, under which it would be traced, are others than at the start.
        """
        self._check_settings()
        lowered = self._lower(key)
        self._check_settings()
        self._compiled[key] = self._compile_lowered(key, beside(lowered))
        self._do_without(tuple(other for other in self.late if other != key))

    def _check_settings(self) -> None:
        if changed := identity.changed(self._settings):
            raise JaxLLMError(
                f"{', '.join(changed)} of jax.config changed after the engine had started. Set it before, or after "
                "llm.wait_until_ready()"
            )

    def _do_without(self, late: tuple[Key, ...]) -> None:
        """Let steps run in programs that are not among these."""
        self.late = late
        self._buckets = tuple(bucket for bucket in self.packings if ("forward", bucket) not in late)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Those that steps run in at present, in ascending order."""
        return self._buckets

    def _replaceable(self) -> tuple[Key, ...]:
        """Of the programs for which others do what they do, slower, in the order in which they are wanted; () where the
        start waits for all.
        """
        return ()

    def step_texts(self, num_tokens: int, num_seqs: int) -> list[str]:
        """The programs that a step of this size runs, one after the other, as their compiler writes them. Those that
        are missing are compiled.
        """
        keys = self._step(self.bucket(num_tokens, num_seqs), num_seqs)
        self._compile(keys)
        return [self._compiled[key].as_text() or "" for key in keys]

    @abc.abstractmethod
    def _step(self, bucket: Bucket, num_seqs: int) -> tuple[Key, ...]:
        """Of the programs of a step in a bucket, all of whose sequences want something."""

    @abc.abstractmethod
    def _keys(self) -> list[Key]:
        """Of all programs but those that copy blocks, and those that encode pictures."""

    def _all_keys(self) -> list[Key]:
        encoder = () if self.encoder is None else self.encoder.keys
        writers = () if self.adapters is None else (ADAPTER_WRITER,)
        return [*self._keys(), *writers, *encoder, *(() if self.block_copies is None else self.block_copies.KEYS)]

    @abc.abstractmethod
    def _largest(self) -> list[tuple[Key, ...]]:
        """Of the programs that may need most; together those whose results live at the same time."""

    def _lower(self, key: Key) -> jax.stages.Lowered:
        """The program of a key, ready to be compiled."""
        if key == ALLOCATOR:
            return self.lower_allocator()
        if key == ADAPTER_WRITER:
            return self.lower_adapter_writer()
        copies = {} if self.block_copies is None else self.block_copies.lowerings()
        encoder = {} if self.encoder is None else self.encoder.lowerings()
        return {**self._lowerings(), **encoder, **copies}[key[0]](*key[1:])

    @abc.abstractmethod
    def _lowerings(self) -> Mapping[str, Callable[..., jax.stages.Lowered]]:
        """What lowers each kind of program, of the rest of its key."""

    @property
    def _whole_params(self) -> Any:
        """Shapes of the weights, the tower's too."""
        return self._params if self._vision is None else dataclasses.replace(self._params, vision=self._vision)

    @property
    def param_shardings(self) -> Any:
        """Of each array of the weights."""
        return jax.tree.map(lambda shape: shape.sharding, self._whole_params)

    def bucket(self, num_tokens: int, num_seqs: int, *, adapters: bool = False) -> Bucket:
        """The one that a step of this size runs in at present, with adapters or without."""
        return pick_bucket(self._buckets, num_tokens, num_seqs, adapters=adapters)

    @property
    def largest(self) -> Bucket:
        return next(reversed(self.packings))

    def gather_blocks(self, lot_size: int) -> jax.stages.Compiled:
        return self._get((GATHER, lot_size))

    def encode(self, num_patches: int) -> jax.stages.Compiled:
        return self._get((ENCODE, num_patches))

    def scatter_blocks(self, lot_size: int) -> jax.stages.Compiled:
        return self._get((SCATTER, lot_size))

    def name(self, key: Key) -> str:
        """Of a program, for people."""
        return _key_text(key)

    def _get(self, key: Key) -> Any:
        """A `jax.stages.Compiled`, or what is called as one."""
        try:
            compiled = self._compiled[key]
            return OneAtATime(compiled) if self._runs_alone else compiled
        except KeyError:
            raise RuntimeError(f"the program for {key} was not compiled ahead of time; please report this") from None


def _key_text(key: Key) -> str:
    forms = {True: "any sampling", False: "greedy sampling"}
    return ", ".join(forms[part] if isinstance(part, bool) else str(part) for part in key)


def lowered(function: Callable[..., Any], *args: Any, donate: int | None = None) -> jax.stages.Lowered:
    """`function` of `args` (trees of `jax.ShapeDtypeStruct`), lowered; `donate`: the argument that is donated.

    Arguments that are not used are kept: which they are does not show in a lowered program's text, by which it is
    found again.
    """
    return jax.jit(function, donate_argnums=() if donate is None else (donate,), keep_unused=True).lower(*args)
