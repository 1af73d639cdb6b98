"""The head of a model that pools: a vector, or scores of classes, of each sequence or of each of its tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.api.pooling_params import PoolingParams
from jaxllm.engine.step import AdmittedRequest, SchedulerOutput, StepOutput
from jaxllm.models.adapters import Stacks, with_adapters
from jaxllm.models.pooler import PoolingModel, embedding_size
from jaxllm.multimodal.items import EncoderInput
from jaxllm.parallel.processes import put_whole
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.compile.encoder import Normalization
from jaxllm.runner.compile.programs import Key, Programs
from jaxllm.runner.compile.progress import StartProgress
from jaxllm.runner.heads.embeddings import Embeddings
from jaxllm.runner.heads.head import Head
from jaxllm.runner.heads.pictures import Pictures
from jaxllm.runner.heads.pooling_step import PoolingState, PoolingStepConfig, pooling_packing, pooling_step, token_step
from jaxllm.runner.packing import MediaFields
from jaxllm.runner.rows import Rows


class PoolingPrograms(Programs):
    """A pooling step for every bucket, and what makes results of each of its tokens.

    Args:
        params, state: trees of `jax.ShapeDtypeStruct` with shardings.
        media: what steps bring of pictures; None: there are none.
        encoder_buckets, pixel_normal: of a model with a tower, see `_with_encoder`.
        platform, cache_dir, spare_bytes, copied_layers, progress, adapters: see `Programs`.
    """

    def __init__(
        self,
        config: PoolingStepConfig,
        buckets: tuple[Bucket, ...],
        table_width: int,
        params: PoolingModel,
        state: PoolingState,
        *,
        platform: str,
        cache_dir: Path | None,
        spare_bytes: int = 0,
        copied_layers: int = 0,
        progress: StartProgress | None = None,
        adapters: Stacks | None = None,
        media: MediaFields | None = None,
        encoder_buckets: tuple[int, ...] = (),
        pixel_normal: Normalization = ((), ()),
    ):
        numbers = len(config.groups), table_width
        packings = {bucket: pooling_packing(bucket, *numbers, media=media) for bucket in buckets}
        super().__init__(
            packings,
            state,
            platform=platform,
            cache_dir=cache_dir,
            source=(config, table_width, params, state, adapters, media, encoder_buckets, pixel_normal),
            spare_bytes=spare_bytes,
            copied_layers=copied_layers,
            progress=progress,
            adapters=adapters,
        )
        self.config: PoolingStepConfig = config
        body: Any = params.body
        if media is not None:
            body = self._with_encoder(body, encoder_buckets, pixel_normal)
        self._params = dataclasses.replace(params, body=body)

    @property
    def _whole_params(self) -> PoolingModel:
        body: Any = self._params.body
        if self._vision is None:
            return self._params
        return dataclasses.replace(self._params, body=dataclasses.replace(body, vision=self._vision))

    def lower_pooling(self, bucket: Bucket) -> jax.stages.Lowered:
        packing = self.packings[bucket]
        function = functools.partial(pooling_step, self.config, bucket, packing)
        words = self._words(packing.size)
        params = self.with_adapters(self._params, bucket)
        args = params, self._state, words, *self.embeddings(bucket)
        return self._lowered(function, *args, donate=1, out=(self._state_specs, jax.P(), jax.P()))

    def lower_tokens(self, bucket: Bucket) -> jax.stages.Lowered:
        packing = self.packings[bucket]
        function = functools.partial(token_step, self.config, packing)
        hidden = self._rows(self._params.body.dtype, bucket.tokens, self.config.model.hidden_size)
        return self._lowered(function, self._params.head, hidden, self._words(packing.size))

    def _keys(self) -> list[Key]:
        return [(kind, bucket) for kind in ("pool", "tokens") for bucket in self.packings]

    def _step(self, bucket: Bucket, num_seqs: int) -> tuple[Key, ...]:
        return (("pool", bucket),)

    def _largest(self) -> list[tuple[Key, ...]]:
        # what one step returns lives until it is read, which may be after the next was launched
        encoder = [] if self.encoder is None else [self.encoder.keys[-1:]]
        return [(("pool", self.largest), ("tokens", self.largest)), *encoder]

    def _lowerings(self) -> dict[str, Callable[..., jax.stages.Lowered]]:
        return {"pool": self.lower_pooling, "tokens": self.lower_tokens}

    def pool(self, bucket: Bucket) -> jax.stages.Compiled:
        return self._get(("pool", bucket))

    def tokens(self, bucket: Bucket) -> jax.stages.Compiled:
        return self._get(("tokens", bucket))


@dataclasses.dataclass(slots=True)
class Entry:
    """Where in a step's results one entry of its SchedulerOutput is."""

    seq: int
    #: of its tokens, when the request wants them all; None: it does not
    tokens: slice | None
    #: whether these are the last ones
    ends: bool
    #: what earlier chunks of the request left on the host
    pieces: list[np.ndarray]


class PoolingResult:
    """A launched step (`engine.step.StepFuture`).

    Args:
        results, tokens: as `pooling_step` and `token_step` return them; `tokens` None: nobody wants them.
        entries: in the order of the SchedulerOutput's.
    """

    def __init__(self, results: jax.Array, tokens: jax.Array | None, entries: list[Entry]):
        self._results, self._tokens, self._entries = results, tokens, entries
        for array in (results, tokens):
            if array is not None:
                array.copy_to_host_async()

    def result(self) -> StepOutput:
        results = np.asarray(self._results)
        tokens = None if self._tokens is None else np.asarray(self._tokens)
        pooled: list[np.ndarray | None] = [None] * len(self._entries)
        for i, entry in enumerate(self._entries):
            if entry.tokens is not None:
                assert tokens is not None
                # steps are read in their order, so the pieces of earlier chunks are here already
                entry.pieces.append(tokens[entry.tokens].copy())
                if entry.ends:
                    pooled[i] = np.concatenate(entry.pieces)
            elif entry.ends:
                pooled[i] = results[entry.seq].copy()
        return StepOutput(token_ids=[], counts=[0] * len(self._entries), pooled=pooled)


class PoolingHead(Head[PoolingModel, PoolingState]):
    """Pools each sequence in the program that computes its tokens; a position is wanted where the sequence ends.

    Args:
        max_num_seqs: rows.
    """

    def __init__(self, programs: PoolingPrograms, max_num_seqs: int):
        self.programs: PoolingPrograms = programs
        self._embeddings, self._pictures = Embeddings(programs), Pictures(programs)
        self._embedding_size = embedding_size(programs.config.model, programs.config.pooler)
        self._params: PoolingModel | None = None
        self._adapters: Stacks | None = None
        #: of all rows, the fields that `pooling_packing` has for each sequence
        self._fields = {name: np.zeros(max_num_seqs, np.int32) for name in ("dimensions", "activate", "segment_starts")}
        self._wants_tokens = np.zeros(max_num_seqs, bool)
        #: a new list for every admission: a step that is still in flight keeps the list of its own
        self._pieces: list[list[np.ndarray]] = [[] for _ in range(max_num_seqs)]

    def use(self, params: PoolingModel | None) -> None:
        self._params, self._pictures.params = params, None
        if params is not None and self.programs.encoder is not None:
            body: Any = params.body
            self._pictures.params = body.vision
            self._params = dataclasses.replace(params, body=dataclasses.replace(body, vision=None))

    def encode(self, state: PoolingState, inputs: Sequence[EncoderInput]) -> PoolingState:
        return dataclasses.replace(state, encoded=self._pictures.encode(state.encoded, inputs))

    def use_adapters(self, adapters: Sequence[Stacks]) -> None:
        (self._adapters,) = adapters

    def admit(self, state: PoolingState, request: AdmittedRequest) -> PoolingState:
        row, params = request.row, request.params
        assert isinstance(params, PoolingParams)
        start = params.segment_start
        # chunks are made of the tokens' states as they are, by the engine
        whole = params.late_chunking is not None
        own = None if whole else params.dimensions
        self._fields["dimensions"][row] = own or self._embedding_size
        self._fields["activate"][row] = bool(params.use_activation) and not whole
        self._fields["segment_starts"][row] = np.iinfo(np.int32).max if start is None else start
        self._wants_tokens[row] = params.wants_tokens
        self._pieces[row] = []
        return state

    def forward(
        self, state: PoolingState, scheduled: SchedulerOutput, rows: Rows
    ) -> tuple[PoolingState, PoolingResult]:
        size = scheduled.num_tokens, len(scheduled.rows)
        bucket = self.programs.bucket(*size, adapters=scheduled.uses_adapters)
        packing = self.programs.packings[bucket]
        # never reused: the device may read it in place
        buffer = np.zeros(packing.size, np.int32)
        fields = packing.views(buffer)
        found = rows.pack(scheduled, fields)
        order, row, first, end, _ = found
        vectors = rows.embeddings(found, bucket.tokens)
        for name, values in self._fields.items():
            fields[name][: len(row)] = values[row]
        wants = self._wants_tokens[row]
        entries = [
            Entry(
                seq,
                slice(int(first[seq]), int(end[seq])) if wants[seq] else None,
                scheduled.wanted[entry] > 0,
                self._pieces[row[seq]],
            )
            for entry, seq in enumerate(np.argsort(order).tolist())
        ]
        state, results, tokens = self._launch(state, bucket, buffer, vectors, want_tokens=bool(wants.any()))
        return state, PoolingResult(results, tokens, entries)

    def sample(
        self, state: PoolingState, launched: PoolingResult, masks: Mapping[int, np.ndarray]
    ) -> tuple[PoolingState, PoolingResult]:
        """Nothing is left to do: a pooling step is one program, and there is nothing that a mask could restrict."""
        return state, launched

    def warm_up(self, state: PoolingState, *, smallest: bool) -> PoolingState:
        for bucket, packing in list(self.programs.packings.items())[: 1 if smallest else None]:
            state, *_ = self._launch(state, bucket, np.zeros(packing.size, np.int32), None, want_tokens=True)
        return dataclasses.replace(state, encoded=self._pictures.warm_up(state.encoded, smallest=smallest))

    def free(self) -> None:
        self._embeddings.free()

    def _launch(
        self, state: PoolingState, bucket: Bucket, words: np.ndarray, vectors: np.ndarray | None, *, want_tokens: bool
    ) -> tuple[PoolingState, jax.Array, jax.Array | None]:
        buffer, params = put_whole(words, self.programs.sharding), self._params
        embeddings = self._embeddings.argument(bucket, vectors)
        if bucket.adapters and self._adapters is not None:
            params = with_adapters(params, self._adapters)
        state, results, hidden = self.programs.pool(bucket)(params, state, buffer, *embeddings)
        tokens = None
        if want_tokens and params is not None:
            tokens = self.programs.tokens(bucket)(params.head, hidden, buffer)
        return state, results, tokens
