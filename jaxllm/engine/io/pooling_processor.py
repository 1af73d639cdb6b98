"""From pooled results to `PoolingRequestOutput`s."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.api.pooling_outputs import PoolingOutput, PoolingRequestOutput, failed_pooling
from jaxllm.api.pooling_params import PoolingParams
from jaxllm.engine.io.late_chunking import chunk_embeddings

if TYPE_CHECKING:
    from jaxllm.engine.request import Request
    from jaxllm.engine.scheduling.scheduler import Scheduler
    from jaxllm.engine.scheduling.step_updates import StepUpdates
    from jaxllm.engine.step import SchedulerOutput, StepOutput


class PoolingProcessor:
    """The output processor of a pooling engine."""

    def __init__(self) -> None:
        #: each unfinished request, and the wall-clock time of its arrival
        self._arrivals: dict[str, tuple[Request, float]] = {}

    def add(self, request: Request, text: str | None) -> None:
        self._arrivals[request.request_id] = request, time.time()

    def end(self, request: Request) -> PoolingRequestOutput[PoolingOutput] | None:
        """The output of a request that was ended from outside."""
        if self._arrivals.pop(request.request_id, None) is None:
            return None
        refused = request.error is not None
        return failed_pooling(request.request_id, request.error or "the request was aborted", is_refused=refused)

    def clear(self) -> None:
        self._arrivals.clear()

    def process(
        self, scheduled: SchedulerOutput, output: StepOutput, updates: StepUpdates, scheduler: Scheduler
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Outputs of a step, one for each request that is computed to its end and still wanted."""
        assert output.pooled is not None
        outputs = []
        for request, data in zip(scheduled.requests, output.pooled, strict=True):
            known, arrival = self._arrivals.get(request.request_id, (None, 0.0))
            if data is not None and known is request:
                del self._arrivals[request.request_id]
                outputs.append(_output(request, data, arrival))
        return outputs


def _output(request: Request, data: np.ndarray, arrival: float) -> PoolingRequestOutput[PoolingOutput]:
    params = request.params
    assert isinstance(params, PoolingParams)
    if params.late_chunking is not None:
        wanted = {"dimensions": params.dimensions, "normalize": bool(params.use_activation)}
        data = chunk_embeddings(data, params.late_chunking, **wanted)
    data = data[..., : params.dimensions]
    if params.step_tag_id is not None:
        data = data[np.asarray(request.prompt_token_ids) == params.step_tag_id]
    if params.returned_token_ids is not None:
        data = data[:, params.returned_token_ids]
    return PoolingRequestOutput(
        request_id=request.request_id,
        outputs=PoolingOutput(data=data),
        prompt_token_ids=request.prompt_token_ids,
        finished=True,
        num_cached_tokens=max(request.num_cached_tokens, 0),
        metrics=request.metrics(arrival),
        late_chunking=params.late_chunking,
    )
