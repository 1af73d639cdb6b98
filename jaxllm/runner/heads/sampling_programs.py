"""The compiled programs of an engine that samples."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxllm.api.logits_processor import extra_arg_defaults
from jaxllm.models.adapters import Stacks, with_own_heads
from jaxllm.models.params import Params, draft_params
from jaxllm.parallel.mesh import own_rows
from jaxllm.runner.buckets import Bucket, pick_bucket
from jaxllm.runner.capacities import SAMPLE_ROWS_CPU
from jaxllm.runner.compile.encoder import Normalization
from jaxllm.runner.compile.identity import has_own_settings
from jaxllm.runner.compile.programs import FIRST_SAMPLE, Key, Programs
from jaxllm.runner.compile.progress import StartProgress
from jaxllm.runner.heads.constraints import ConstraintShape
from jaxllm.runner.heads.decode_steps import decode_steps
from jaxllm.runner.heads.draft_steps import DraftParams, catch_up, draft_steps
from jaxllm.runner.heads.sampling_fields import (
    catch_up_packing,
    decode_packing,
    draft_packing,
    forward_packing,
    sample_packing,
)
from jaxllm.runner.heads.sampling_step import State, StepConfig, forward_step, sample_step, score_step, write_tokens
from jaxllm.runner.heads.weight_forms import Form, with_head_for_one, with_whole_layers
from jaxllm.runner.packing import MediaFields
from jaxllm.speculative.adaptive import AdaptiveDrafts, check_costs, check_lengths
from jaxllm.speculative.draft_model import ModelDrafter, reading_costs
from jaxllm.speculative.suffix import SuffixDrafter
from pallas_kernels.backend import Backend
from pallas_kernels.packed_matmul.api import MOST_ROWS

#: rows whose logits exist at once on a GPU; for more than the largest there are samplers of several slices
SAMPLE_ROWS_GPU = (8, 64, 256)

#: an engine answers before all of its programs are there: steps of up to so many tokens run in one, all others in the
#: largest
FIRST_TOKENS = 32

WRITER: Key = ("write tokens",)
OUTPUT_WRITER: Key = ("write outputs",)
SCORER: Key = ("score",)
#: tokens that one launch of it carries
WRITE_TOKENS = 1024


class SamplingPrograms(Programs):
    """A forward step for every bucket, sampling for a few sizes of slice."""

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
        spare_bytes: int = 0,
        copied_layers: int = 0,
        progress: StartProgress | None = None,
        num_decode_steps: int = 1,
        decode_buckets: tuple[Bucket, ...] = (),
        draft_buckets: tuple[Bucket, ...] = (),
        num_draft_steps: int = 1,
        media: MediaFields | None = None,
        encoder_buckets: tuple[int, ...] = (),
        pixel_normal: Normalization = ((), ()),
        adapters: Stacks | None = None,
        num_rows: int | None = None,
        answers_early: bool = False,
    ):
        """
        Args:
            params, state: trees of `jax.ShapeDtypeStruct` with shardings.
            num_decode_steps: most steps of one launch of a program for several.
            decode_buckets: those that have such programs.
            draft_buckets: the sequences of the programs that check drafts.
            num_draft_steps: most steps of a launch with drafts.
            num_rows: of requests, that there is room for; None: as many as `state` has.
            eager: one sampler instead of one for each size of slice.
            answers_early: steps run before all programs are there, where others can stand in for those.
            media: what steps bring of pictures; None: there are none.
            encoder_buckets, pixel_normal: of a model with a tower, see `_with_encoder`.
            platform, cache_dir, spare_bytes, copied_layers, progress, adapters: see `Programs`.
        """
        numbers = len(config.groups), table_width, config.max_scored_tokens
        model_drafts = isinstance(config.drafter, ModelDrafter)
        packings = {
            bucket: forward_packing(bucket, *numbers, media=media, model_drafts=model_drafts) for bucket in buckets
        }
        if num_rows is None:
            num_rows = state.tokens.shape[0] - 1
        sizes = SAMPLE_ROWS_CPU if platform == "cpu" else (buckets[0].seqs, *SAMPLE_ROWS_GPU)
        self._sample_rows = sorted({min(size, num_rows) for size in sizes})
        while platform != "cpu" and self._sample_rows[-1] < num_rows:
            self._sample_rows.append(min(2 * self._sample_rows[-1], num_rows))
        if eager:
            self._sample_rows = self._sample_rows[-1:]
        #: those of the samplers that are there
        self._ready_rows = tuple(self._sample_rows)
        self._answers_early = answers_early and platform == "cpu" and not eager
        pictures = media, encoder_buckets, pixel_normal
        several = num_decode_steps, num_draft_steps, *pictures, num_rows, self._sample_rows[-1]
        super().__init__(
            packings,
            state,
            platform=platform,
            cache_dir=cache_dir,
            # not the buckets, which are in the keys: an engine that has others finds those that it shares
            source=(config, table_width, params, state, adapters, *several),
            spare_bytes=spare_bytes,
            copied_layers=copied_layers,
            progress=progress,
            adapters=adapters,
        )
        on_cpu = platform == "cpu"
        self.config = config = dataclasses.replace(
            config, on_cpu=on_cpu, fixed_sample_rows=None if on_cpu else SAMPLE_ROWS_GPU[-1]
        )
        self._params = params = self._with_encoder(params, encoder_buckets, pixel_normal)
        #: whether a single row has products of its own (`layers.stacked_matrix`)
        self.has_one_row_products = platform == "cpu" and self._mesh is None and not config.context.deterministic
        self.num_decode_steps = num_decode_steps
        self.decode_packings = {bucket: decode_packing(bucket, *numbers, media=media) for bucket in decode_buckets}
        self.drafter, self.num_draft_steps = config.drafter, num_draft_steps
        lengths = () if self.drafter is None else check_lengths(platform, self.drafter.num_drafts)
        self.adaptive = AdaptiveDrafts(lengths)
        most = 0 if self.drafter is None else self.drafter.num_drafts
        self.draft_packings = {
            bucket: draft_packing(bucket, *numbers, len(lengths), most, media=media) for bucket in draft_buckets
        }
        #: of a model that drafts, the programs that let it read what it has passed over
        self.catch_up_packings = {
            bucket: catch_up_packing(bucket, *numbers[:2], media=media)
            for bucket in draft_buckets
            if model_drafts and not bucket.adapters
        }
        #: number of sequences -> int32, what checks of each length take longer than a step (`AdaptiveDrafts.choose`)
        self.check_costs: dict[int, np.ndarray] = {}
        #: of a model that drafts, what reading costs
        self.reading_costs = reading_costs(platform, _draft_cost(params)) if model_drafts else None
        for bucket in draft_buckets:
            few_rows, cost = [form != "plain" for form in self.check_forms(bucket)], _draft_cost(params)
            self.check_costs[bucket.seqs] = check_costs(
                platform, lengths, few_rows, num_seqs=bucket.seqs, draft_cost=cost
            )
        #: tokens of ended requests that are kept for drafts, and the most requests
        self.num_kept_tokens = 0 if state.outputs is None else state.outputs.shape[1] - 1
        self.max_kept_outputs = self.drafter.max_outputs if isinstance(self.drafter, SuffixDrafter) else 0
        #: that there is room for
        self.max_num_seqs = num_rows
        #: whether adapters may have heads, and samplers know whose each row is
        self.has_own_heads = adapters is not None and adapters.tables is not None
        self.sample_packing = sample_packing(
            self.max_num_seqs, len(extra_arg_defaults(config.processors)), own_heads=self.has_own_heads
        )
        #: whether samplers are whole; a GPU also gets greedy-only ones, whose launches never wait for a branch
        self._variants = (True,) if platform == "cpu" or config.processors else (True, False)

    def lower_forward(self, bucket: Bucket) -> jax.stages.Lowered:
        packing = self.packings[bucket]
        function = functools.partial(forward_step, self.config, bucket, packing)
        words = self._words(packing.size + self.sample_packing.size)
        out = self._state_specs, own_rows(self._mesh), own_rows(self._mesh)
        args = self._params_for(bucket), self._state, words, *self.embeddings(bucket)
        return self._lowered(function, *args, donate=1, out=out)

    def form(self, bucket: Bucket) -> Form:
        """In which form a bucket's programs take the weights."""
        if bucket.tokens == 1 and self.has_one_row_products:
            return "one row"
        backend = self.config.context.backend
        if backend.cpu_kernels and bucket.tokens <= MOST_ROWS:
            return "few rows"
        has_kernels = backend.cpu_dense or backend.cpu_kernels or backend.cpu_int8
        return "several rows" if has_kernels else "plain"

    def _params_for(self, bucket: Bucket) -> Params:
        return self.with_adapters(self.params_in(self.form(bucket), self._params), bucket)

    def forms(self, params: Params) -> dict[Form, Params]:
        """The weights in all forms that programs take them in, in the same memory."""
        forms: set[Form] = {self.form(bucket) for bucket in (*self.packings, *self.decode_packings)}
        for bucket in self.draft_packings:
            forms.update((self.form(bucket), *self.check_forms(bucket)))
        return {form: self.params_in(form, params) for form in forms}

    def check_forms(self, bucket: Bucket) -> tuple[Form, ...]:
        """In which forms checks of each length take the weights."""
        return tuple(self.form(bucket._replace(tokens=bucket.seqs * (1 + length))) for length in self.adaptive.lengths)

    def params_in(self, form: Form, params: Params) -> Params:
        """The weights, or their shapes, in a form."""
        if form == "plain":
            return params
        return self._with_whole(params, self.config.context.backend, one_row=form == "one row")

    def _with_whole(self, params: Params, backend: Backend, *, one_row: bool) -> Params:
        return with_whole_layers(params, backend, one_row=one_row)

    def head_params(self, params: Params) -> Params:
        """What sampling takes of the weights: few arguments make quick launches.

        Args:
            params: arrays, or their shapes.
        """
        params = dataclasses.replace(params, layers=None, norm=None, draft=None)
        return with_head_for_one(params, self.config.context.backend) if self.has_one_row_products else params

    def lower_sampler(self, rows: int, full: bool) -> jax.stages.Lowered:
        packing = self.sample_packing
        function = functools.partial(sample_step, self.config, rows, packing)
        hidden = self._hidden(self.max_num_seqs)
        head = with_own_heads(self.head_params(self._params), self.adapters)
        words = self._words(packing.size)
        return self._lowered(function, head, self._state.tokens, hidden, words, self._constraints(full), donate=1)

    def _constraints(self, full: bool, *rows: int) -> jax.ShapeDtypeStruct | None:
        shape = ConstraintShape(self.config.model.vocab_size)
        return self._words(*(rows or (self.max_num_seqs,)), shape.row_size) if full else None

    def lower_decode_steps(self, bucket: Bucket, full: bool) -> jax.stages.Lowered:
        packing, sample_packing = self.decode_packings[bucket], self.sample_packing
        rows = self._sampler_rows(bucket.seqs)
        function = functools.partial(
            decode_steps, self.config, self.num_decode_steps, rows, bucket, packing, sample_packing
        )
        words = self._words(packing.size + sample_packing.size)
        out = self._state_specs, jax.P()
        params = self._params_for(bucket)
        return self._lowered(function, params, self._state, words, self._constraints(full), donate=1, out=out)

    def lower_draft_steps(self, bucket: Bucket, full: bool) -> jax.stages.Lowered:
        packing, sample_packing, drafter = self.draft_packings[bucket], self.sample_packing, self.drafter
        assert drafter is not None
        # most steps of a CPU have few rows; a GPU takes one look at the head for many
        rows = SAMPLE_ROWS_CPU[0] if self.config.fixed_sample_rows is None else SAMPLE_ROWS_GPU[-1]
        function = functools.partial(
            draft_steps,
            self.config,
            drafter,
            self.adaptive,
            self.num_draft_steps,
            rows,
            bucket,
            packing,
            sample_packing,
        )
        words = self._words(packing.size + sample_packing.size)
        single, *several = (
            self.with_adapters(self.params_in(form, self._params), bucket)
            for form in (self.form(bucket), *self.check_forms(bucket))
        )
        out = self._state_specs, jax.P()
        params = DraftParams(single, tuple(several))
        constraints = self._constraints(full, 1 + drafter.num_drafts, bucket.seqs)
        return self._lowered(function, params, self._state, words, constraints, donate=1, out=out)

    def lower_catch_up(self, bucket: Bucket) -> jax.stages.Lowered:
        packing, drafter = self.catch_up_packings[bucket], self.drafter
        assert isinstance(drafter, ModelDrafter)
        function = functools.partial(catch_up, self.config.context, drafter, bucket, packing)
        params = draft_params(self.params_in(self.check_forms(bucket)[-1], self._params))
        words = self._words(packing.size)
        return self._lowered(function, params, self._state, words, donate=1, out=self._state_specs)

    def lower_scorer(self) -> jax.stages.Lowered:
        function = functools.partial(score_step, self.config, self._sample_rows[-1])
        hidden, head = self._hidden(self.config.max_scored_tokens), self.head_params(self._params)
        words = self._words(self.num_target_words)
        return self._lowered(function, with_own_heads(head, self.adapters), hidden, words)

    @property
    def num_target_words(self) -> int:
        """Of what `score_step` takes."""
        return 1 + self.config.max_scored_tokens * (1 + self.has_own_heads)

    def lower_writer(self) -> jax.stages.Lowered:
        return self._lowered(write_tokens, self._state.tokens, self._words(3 + WRITE_TOKENS), donate=0)

    def lower_output_writer(self) -> jax.stages.Lowered:
        return self._lowered(write_tokens, self._state.outputs, self._words(3 + WRITE_TOKENS), donate=0)

    def _hidden(self, rows: int) -> jax.ShapeDtypeStruct:
        return self._rows(self._params.dtype, rows, self.config.model.hidden_size)

    @property
    def _begins_early(self) -> bool:
        """Whether steps run before all programs are there."""
        special = self.decode_packings or self.draft_packings or self.adapters or self.encoder
        # the user's own code may mean something else by then
        special = special or self.config.processors or self._mesh is not None or self._store is None
        return self._answers_early and not special and not has_own_settings()

    @functools.cached_property
    def _first_sampler(self) -> Key | None:
        """What samples until another sampler is there; None: another one is kept, or there is no time without one."""
        rows, store = self._sample_rows[-1], self._store
        # the other's last digits may be others
        if not self._begins_early or self.config.context.deterministic or store is None:
            return None
        return None if store.has(("sample", rows, True)) else (FIRST_SAMPLE, rows, True)

    def _keys(self) -> list[Key]:
        samplers: list[Key] = [("sample", rows, full) for rows in self._sample_rows for full in self._variants]
        if self._first_sampler is not None:
            samplers.append(self._first_sampler)
        forwards = [("forward", bucket) for bucket in self.packings]
        several = [("decode steps", bucket, full) for bucket in self.decode_packings for full in self._variants]
        several += [("draft steps", bucket, full) for bucket in self.draft_packings for full in self._variants]
        several += [("catch up", bucket) for bucket in self.catch_up_packings]
        writers = [WRITER] if self._state.outputs is None else [WRITER, OUTPUT_WRITER]
        return [*several, *samplers, SCORER, *forwards, *writers]

    def _replaceable(self) -> tuple[Key, ...]:
        if not self._begins_early:
            return ()
        some = next((bucket for bucket in self.packings if bucket.tokens >= FIRST_TOKENS), self.largest)
        forwards: list[Key] = [("forward", bucket) for bucket in self.packings if bucket not in (some, self.largest)]
        # what a few requests run in comes first; any sampler samples any number of rows
        late_rows = self._sample_rows if self._first_sampler is not None else self._sample_rows[:-1]
        samplers: list[Key] = [("sample", rows, full) for rows in late_rows for full in self._variants]
        return (*forwards[:2], *samplers, *forwards[2:])

    def _do_without(self, late: tuple[Key, ...]) -> None:
        super()._do_without(late)
        self._ready_rows = tuple(rows for rows in self._sample_rows if ("sample", rows, True) not in late)

    def _step(self, bucket: Bucket, num_seqs: int) -> tuple[Key, ...]:
        return ("forward", bucket), ("sample", self._sampler_rows(num_seqs), True)

    def _largest(self) -> list[tuple[Key, ...]]:
        sampler = self._first_sampler or ("sample", self._sample_rows[-1], True)
        # a head calls but one kernel, and is compiled while that of attention is
        keys: list[Key] = [sampler, SCORER, ("forward", self.largest)]
        if self.decode_packings:
            keys.append(("decode steps", next(reversed(self.decode_packings)), True))
        if self.draft_packings:
            keys.append(("draft steps", next(reversed(self.draft_packings)), True))
        if self.encoder is not None:
            keys.append(self.encoder.keys[-1])
        return [(key,) for key in keys]

    def _lowerings(self) -> dict[str, Callable[..., jax.stages.Lowered]]:
        return {
            "forward": self.lower_forward,
            "sample": self.lower_sampler,
            FIRST_SAMPLE: self.lower_sampler,
            "decode steps": self.lower_decode_steps,
            "draft steps": self.lower_draft_steps,
            "catch up": self.lower_catch_up,
            "score": self.lower_scorer,
            "write tokens": self.lower_writer,
            "write outputs": self.lower_output_writer,
        }

    def bucket_of_all(self, sizes: Sequence[tuple[int, int]]) -> Bucket:
        """The one that the steps of these sizes, (tokens, sequences), all run in."""
        tokens, seqs = (max(numbers) for numbers in zip(*sizes, strict=True))
        single = all(tokens == seqs for tokens, seqs in sizes)
        return pick_bucket(tuple(bucket for bucket in self.packings if single or not bucket.decode_only), tokens, seqs)

    def forward(self, bucket: Bucket) -> jax.stages.Compiled:
        return self._get(("forward", bucket))

    def sampler(self, num_samples: int, full: bool) -> tuple[jax.stages.Compiled, bool]:
        """The sampler for a step, and whether it takes constraints; `full` when a row needs more than its most likely
        token.
        """
        full = full or False not in self._variants
        ready = self._ready_rows
        if not ready:
            return self._get(self._first_sampler or ()), full
        rows = next((rows for rows in ready if rows >= num_samples), ready[-1])
        return self._get(("sample", rows, full)), full

    def _sampler_rows(self, num_samples: int) -> int:
        return next((rows for rows in self._sample_rows if rows >= num_samples), self._sample_rows[-1])

    def decode_steps(self, bucket: Bucket, full: bool) -> tuple[jax.stages.Compiled, bool]:
        """The program for several steps, and whether it takes constraints, as `sampler`."""
        full = full or False not in self._variants
        return self._get(("decode steps", bucket, full)), full

    def draft_steps(self, bucket: Bucket, full: bool) -> tuple[jax.stages.Compiled, bool]:
        """The program that checks drafts, and whether it takes constraints, as `sampler`."""
        full = full or False not in self._variants
        return self._get(("draft steps", bucket, full)), full

    def catch_up(self, bucket: Bucket) -> jax.stages.Compiled:
        return self._get(("catch up", bucket))

    @property
    def scorer(self) -> jax.stages.Compiled:
        return self._get(SCORER)

    @property
    def writer(self) -> jax.stages.Compiled:
        return self._get(WRITER)

    @property
    def output_writer(self) -> jax.stages.Compiled:
        return self._get(OUTPUT_WRITER)


def _draft_cost(params: Params) -> float:
    """Of a step of what drafts, in steps of the model: reading weights is what decoding takes."""

    def size(tree: Params | None) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    draft = draft_params(params)
    if draft is not None and draft.joint is not None:
        # of the model's table, rows of its tokens alone
        draft = dataclasses.replace(draft, embedding=None)  # pyright: ignore[reportArgumentType]
    return size(draft) / max(size(dataclasses.replace(params, draft=None)), 1)
