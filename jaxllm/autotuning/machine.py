"""Engines of this machine, which are measured in turns."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.autotuning.capacity import Planner
from jaxllm.autotuning.goals import Goals
from jaxllm.autotuning.measure import MeasuredRun, measure
from jaxllm.autotuning.result import Effect, Finalist, arguments_text, medians
from jaxllm.autotuning.search import AS_GOOD
from jaxllm.autotuning.trials import MEASURED, Journal, Trial
from jaxllm.engine.observe.progress import bar_class
from jaxllm.tuning.simulation.fitted_steps import FittedSteps
from jaxllm.tuning.simulation.step_times import StepTimes
from jaxllm.tuning.simulation.workload import Workload
from jaxllm.tuning.trace_file import read_trace

logger = logging.getLogger("jaxllm")

#: seconds of measuring from which on somebody wants to know how long it will take
_LONG = 300
#: times that the leading ones are measured in all rounds, and a gain for which it is not worth it
LAPS, CLOSE = 3, 0.02
#: by how much a constraint is missed that another round will not keep
MISSED = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Runs the workload on engines, and has the journal keep what comes of it.

    Args:
        folder: for the traces that steps are learnt from; None: they are not kept.
        show: as `trial_bar` has it.
    """

    planner: Planner
    workload: Workload
    goals: Goals
    journal: Journal
    folder: Path | None
    show: bool | Callable[..., Any]

    def step_times(self, arguments: Mapping[str, Any]) -> StepTimes:
        """Of an engine with these arguments, from a run of the workload and from steps of every size."""
        name = "-".join(["defaults", *(f"{name}-{value}" for name, value in arguments.items())])
        paths = [None if self.folder is None else self.folder / f"{name}.{kind}.json" for kind in ("trace", "steps")]
        if self.journal.measured(arguments) and paths[0] is not None and paths[0].exists():
            traces = [read_trace(path) for path in paths if path is not None and path.exists()]
        else:
            with trial_bar(self.show, 1, f"Measuring {arguments_text(arguments)}") as bar:
                fixed = self.planner.fixed
                found = measure(self.planner.model, {**fixed, **arguments}, self.workload, with_steps=True)
                bar.update()
            traces = [found.trace] if found.steps is None else [found.trace, found.steps]
            for trace, path in zip(traces, paths, strict=False):
                if path is not None:
                    trace.save(path)
            self._keep(arguments, found, 1)
        if traces[0].settings is not None:
            self.planner.learn(traces[0].settings)
        columns = [trace.arrays() for trace in traces]
        return FittedSteps.of({name: np.concatenate([each[name] for each in columns]) for name in columns[0]})

    def foretell(self, runs: int) -> None:
        """Say how long so many runs will take, where that is long."""
        seconds = Finalist.of(self.journal, {}).numbers.get("seconds", 0.0)
        if runs * seconds > _LONG:
            logger.info(
                "The defaults took %.0f s for the workload, and %d runs of it follow, or up to %d times as many where "
                "settings are close: %.0f minutes at least, and starts of engines. Fewer requests (--num-prompts), "
                "--rounds 1, or --num-measured 1 take less; Ctrl-C gives the best so far, and the same command goes on "
                "from there.",
                seconds,
                runs,
                LAPS,
                runs * seconds / 60,
            )

    def race(self, wanted: Sequence[Mapping[str, Any]], first: int, rounds: int, what: str) -> tuple[Trial, int]:
        """Measure each in so many rounds, and then as many again of those that may yet be the fastest, until that is
        one alone, in `LAPS` at most.

        Args:
            first: the number of the first round.

        Returns:
            The fastest, and the number of the round that the next race begins with.
        """
        left, lap = list(wanted), 1
        while True:
            # later rounds, which an earlier run may have left, do not change what is measured next
            so_far = range(first, first + lap * rounds)
            self.in_turns(left, so_far, what)
            fastest = self.fastest(left, so_far)
            left = [each for each in left if self._may_pass(each, fastest.arguments, so_far)]
            if len(left) < 2 or lap == LAPS:
                return fastest, first + LAPS * rounds
            lap += 1

    def _may_pass(self, other: Mapping[str, Any], best: Mapping[str, Any], rounds: range) -> bool:
        """Whether some arguments may be better than the best by more than `CLOSE`, for all that these rounds have said:
        twice the standard error of their gain, round by round. The best itself may; what misses constraints may not.
        """
        ours, theirs = (Finalist.of(self.journal, each, rounds) for each in (best, other))
        if other == best or len(ours.measured) != len(theirs.measured):
            return other == best
        if self.goals.excess(theirs.numbers) > max(self.goals.excess(ours.numbers), 0.0) + MISSED:
            return False
        gains = np.array([self.goals.gain(them, us) for us, them in zip(ours.measured, theirs.measured, strict=True)])
        if len(gains) < 2 or not np.isfinite(gains).all():
            return bool((gains == np.inf).any())
        return bool(gains.mean() + 2 * gains.std(ddof=1) / np.sqrt(len(gains)) > CLOSE)

    def in_turns(self, wanted: Sequence[Mapping[str, Any]], rounds: range, what: str) -> None:
        """Measure each in every round, one after the other, and the other way round in the next; those that have been
        are not measured again.
        """
        missing = [
            (number, arguments)
            for number in rounds
            for arguments in (wanted if number % 2 else wanted[::-1])
            if number not in {trial.round for trial in self.journal.measured(arguments)}
        ]
        with trial_bar(self.show, len(missing), what) as bar:
            for number, arguments in missing:
                bar.set_postfix_str(arguments_text(arguments))
                if not any(trial.problem for trial in self.journal.measured(arguments)):
                    try:
                        found = measure(self.planner.model, {**self.planner.fixed, **arguments}, self.workload)
                    except (JaxLLMError, RuntimeError, MemoryError) as error:
                        problem = str(error) or type(error).__name__
                        self.journal.add(
                            Trial(kind=MEASURED, arguments=dict(arguments), numbers=None, problem=problem, round=number)
                        )
                    else:
                        self._keep(arguments, found, number)
                bar.update()

    def _keep(self, arguments: Mapping[str, Any], found: MeasuredRun, number: int) -> None:
        numbers = self.goals.numbers(found.run)
        self.journal.add(Trial(kind=MEASURED, arguments=dict(arguments), numbers=numbers, round=number))

    def fastest(self, wanted: Sequence[Mapping[str, Any]], rounds: range | None = None) -> Trial:
        """Of those that were measured, the best by its medians of some rounds, or of all; of those as good, the one
        with fewest values.
        """
        found = [(Finalist.of(self.journal, arguments, rounds), arguments) for arguments in wanted]
        found = [(finalist, arguments) for finalist, arguments in found if finalist.measured]
        if not found:
            problems = [trial.problem for arguments in wanted for trial in self.journal.measured(arguments)]
            raise ValidationError(f"no engine could be measured: {next(iter(problems), 'nothing was tried')}")
        best, chosen = min(found, key=lambda each: self.goals.rank(each[0].numbers))
        for finalist, arguments in found:
            kept = self.goals.excess(finalist.numbers) <= max(self.goals.excess(best.numbers), 0.0)
            as_good = self.goals.gain(finalist.numbers, best.numbers) >= -AS_GOOD
            if kept and as_good and len(arguments) < len(chosen):
                best, chosen = finalist, arguments
        return Trial(kind=MEASURED, arguments=dict(chosen), numbers=dict(best.numbers))

    def effect(self, effect: Effect, best: Mapping[str, Any], without: Mapping[str, Any]) -> Effect:
        """The effect as it was measured, in the rounds that both had; as it was simulated, where there were none."""
        ours, theirs = (
            {trial.round: trial.numbers for trial in self.journal.measured(each) if trial.numbers is not None}
            for each in (best, without)
        )
        common = sorted(ours.keys() & theirs.keys())
        if not common:
            return effect
        with_it, rest = (medians([runs[number] for number in common]) for runs in (ours, theirs))
        gain = self.goals.gain(with_it, rest)
        return dataclasses.replace(effect, without=rest, gain=gain, is_measured=True, problem="")


def trial_bar(show: bool | Callable[..., Any], total: int, what: str) -> Any:
    """A progress bar of trials.

    Args:
        show: whether it is seen, or what makes it, with tqdm's arguments.
    """
    make = show if callable(show) else bar_class()
    return make(total=total, desc=what, unit="trial", dynamic_ncols=True, disable=not show)
