"""Requests that come at their times, with the lengths that they have."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxllm.engine.observe.trace import RequestRecord


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadRequest:
    """One request."""

    #: seconds after the first one's
    arrival: float
    num_prompt_tokens: int
    num_output_tokens: int
    #: of the full blocks of its prompt; (): nobody has any of it
    block_hashes: tuple[bytes, ...] = ()


def recorded(requests: Iterable[RequestRecord]) -> list[WorkloadRequest]:
    """The workload that a trace has seen: requests that got at least one token."""
    done = [request for request in requests if request.num_output_tokens]
    first = min((request.queued for request in done), default=0.0)
    return [
        WorkloadRequest(
            arrival=request.queued - first,
            num_prompt_tokens=request.num_prompt_tokens,
            num_output_tokens=request.num_output_tokens,
            block_hashes=tuple(bytes.fromhex(text) for text in request.block_hashes),
        )
        for request in done
    ]
