"""How a workload would fare with some arguments: the plan says what fits, the simulator what comes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.autotuning.capacity import Capacity, Planner, quiet
from jaxllm.autotuning.goals import Goals
from jaxllm.autotuning.trials import SIMULATED, Trial
from jaxllm.tuning.simulation.simulate import simulate
from jaxllm.tuning.simulation.simulated_run import SimulatedRun
from jaxllm.tuning.simulation.step_times import StepTimes
from jaxllm.tuning.simulation.workload import Workload

#: of an engine -> how long its steps take
StepTimesOf = Callable[[Capacity], StepTimes]


class Forecast:
    """Simulates engines of one planner.

    Args:
        step_times: may be another for each engine, such as one that is split over more devices.
    """

    def __init__(self, planner: Planner, workload: Workload, goals: Goals, step_times: StepTimesOf) -> None:
        self.planner, self.workload, self.goals = planner, workload, goals
        self._step_times = step_times
        self._parts: dict[int, list[Workload]] = {1: [workload]}

    def __call__(self, arguments: Mapping[str, Any]) -> Trial:
        """A simulated trial of these arguments; without numbers where there is no such engine."""
        try:
            numbers = self.goals.numbers(self.run(arguments))
        except ValidationError as error:
            return Trial(kind=SIMULATED, arguments=dict(arguments), numbers=None, problem=str(error))
        return Trial(kind=SIMULATED, arguments=dict(arguments), numbers=numbers)

    def run(self, arguments: Mapping[str, Any]) -> SimulatedRun:
        """Raises ValidationError where there is no such engine, or it does not serve the workload."""
        capacity = self.planner.capacity(arguments)
        settings = capacity.settings
        if (longest := self.workload.longest) > (settings.max_model_len or 0):
            raise ValidationError(
                f"max_model_len={settings.max_model_len} is less than the {longest} tokens of the longest request."
            )
        times = self._step_times(capacity)
        with quiet():
            runs = [simulate(part, settings, times) for part in self._split(capacity.args.data_parallel_size)]
        return runs[0] if len(runs) == 1 else _together(runs)

    def _split(self, replicas: int) -> list[Workload]:
        """The workloads of replicas that take requests in turns."""
        if replicas not in self._parts:
            requests, count = self.workload.requests, min(replicas, len(self.workload))
            limit = self.workload.max_concurrency
            if limit is not None:
                # as many at a time as there may be, of all replicas together
                count = min(count, limit)
            self._parts[replicas] = [
                dataclasses.replace(
                    self.workload,
                    requests=requests[number::count],
                    max_concurrency=None if limit is None else len(range(number, limit, count)),
                )
                for number in range(count)
            ]
        return self._parts[replicas]


def _together(runs: list[SimulatedRun]) -> SimulatedRun:
    """Of replicas beside each other, as one."""
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(run, name) for run in runs])
        for name in (
            "arrivals", "firsts", "lasts", "prompt_lengths", "output_lengths", "itl",
            "times", "kv_cache_usage", "num_running", "num_waiting",
        )
    }  # fmt: skip
    return SimulatedRun(
        preemptions=sum(run.preemptions for run in runs),
        cached_tokens=sum(run.cached_tokens for run in runs),
        **columns,
    )
