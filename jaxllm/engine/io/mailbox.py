"""Outputs that wait until they are asked for."""

from __future__ import annotations

from collections.abc import Iterable

from jaxllm.api.outputs import RequestOutput


class Mailbox:
    """What the requests of `LLMEngine` bring. It belongs to the engine, whose steps deliver into it."""

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []
        #: ids of the requests of which more will come
        self.unfinished: set[str] = set()

    def receive(self, output: RequestOutput) -> None:
        if output.finished:
            self.unfinished.discard(output.request_id)
        self.outputs.append(output)

    def take(self) -> list[RequestOutput]:
        outputs, self.outputs = self.outputs, []
        return outputs

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget what there is of these requests."""
        ids = set(request_ids)
        self.unfinished -= ids
        self.outputs = [output for output in self.outputs if output.request_id not in ids]
