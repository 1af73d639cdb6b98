"""Steps whose times are said, not measured."""

from __future__ import annotations

import dataclasses

from jaxllm.engine.observe.step_shape import StepShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSteps:
    """A fixed time, one for each token of the program, and one for each token that is attended to; in seconds."""

    fixed: float
    token: float
    context: float = 0.0
    pair: float = 0.0
    host: float = 0.0
    host_request: float = 0.0

    def device_seconds(self, shape: StepShape) -> float:
        attended = self.context * shape.decode_context + self.pair * shape.chunk_pairs
        return shape.num_steps * (self.fixed + self.token * shape.num_tokens) + attended

    def host_seconds(self, num_requests: int) -> float:
        return self.host + self.host_request * num_requests

    def __str__(self) -> str:
        return f"a step takes {1e3 * self.fixed:.3g} ms and {1e6 * self.token:.3g} us a token, as was said"
