"""How many drafts there were, and how many of them were right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxllm.api.metric import Counter, Metric, Vector

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np


class DraftCounts:
    """Counters since the engine's start.

    Args:
        most: drafts of a step; 0: nobody makes any, and there are no metrics.
    """

    def __init__(self, most: int) -> None:
        #: steps of a request that had drafts, their drafts, and those that were right
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        #: right ones by their place in the draft
        self._accepted_by_place = [0] * most

    def add(self, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """Of one launch, i32 [entries, steps] each (`StepOutput.drafted`)."""
        self.num_drafts += int((drafted > 0).sum())
        self.num_draft_tokens += int(drafted.sum())
        self.num_accepted_tokens += int(accepted.sum())
        for place in range(len(self._accepted_by_place)):
            self._accepted_by_place[place] += int((accepted > place).sum())

    def metrics(self, labels: Mapping[str, str]) -> list[Metric]:
        """vLLM's; [] where nobody makes drafts."""
        if not self._accepted_by_place:
            return []
        values = {
            "vllm:spec_decode_num_drafts": self.num_drafts,
            "vllm:spec_decode_num_draft_tokens": self.num_draft_tokens,
            "vllm:spec_decode_num_accepted_tokens": self.num_accepted_tokens,
        }
        found: list[Metric] = [Counter(name, dict(labels), value) for name, value in values.items()]
        by_place = list(self._accepted_by_place)
        return [*found, Vector("vllm:spec_decode_num_accepted_tokens_per_pos", dict(labels), by_place)]
