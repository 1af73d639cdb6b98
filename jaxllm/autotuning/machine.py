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
from jaxllm.autotuning.gain import Gain
from jaxllm.autotuning.goals import Goals
from jaxllm.autotuning.measure import MeasuredRun, measure
from jaxllm.autotuning.result import Effect, arguments_text, medians
from jaxllm.autotuning.search import AS_GOOD
from jaxllm.autotuning.trials import CALIBRATED, MEASURED, Journal, Trial, key_of
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
        """Of an engine with these arguments, from a run of the workload and from steps of every size.

        That run is no round of a race: its rivals run in other minutes, when the machine may be half as fast.
        """
        name = "-".join(["defaults", *(f"{name}-{value}" for name, value in arguments.items())])
        paths = [None if self.folder is None else self.folder / f"{name}.{kind}.json" for kind in ("trace", "steps")]
        if self.journal.calibrated(arguments) and paths[0] is not None and paths[0].exists():
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
            self._keep(CALIBRATED, arguments, found)
        if traces[0].settings is not None:
            self.planner.learn(traces[0].settings)
        columns = [trace.arrays() for trace in traces]
        return FittedSteps.of({name: np.concatenate([each[name] for each in columns]) for name in columns[0]})

    def foretell(self, runs: int) -> None:
        """Say how long so many runs will take, where that is long."""
        calibrated = self.journal.calibrated({})
        seconds = 0.0 if calibrated is None else (calibrated.numbers or {}).get("seconds", 0.0)
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
        one alone, in `LAPS` at most. The defaults, where they are among them, are in every round: what is told of the
        others is how they did beside these.

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
            left = [each for each in left if not each or self._may_pass(each, fastest.arguments, so_far)]
            if all(each in ({}, fastest.arguments) for each in left) or lap == LAPS:
                return fastest, first + LAPS * rounds
            lap += 1

    def _may_pass(self, other: Mapping[str, Any], best: Mapping[str, Any], rounds: range) -> bool:
        """Whether some arguments may be better than the best by more than `CLOSE`, for all that these rounds have said:
        twice the standard error of their gain, round by round. The best itself may; what misses constraints may not.
        """
        if other == best:
            return True
        ours, theirs = self._beside(best, other, rounds)
        if len(ours) < 2:
            # one round shows nothing
            return bool(ours)
        if self.goals.excess(medians(theirs)) > max(self.goals.excess(medians(ours)), 0.0) + MISSED:
            return False
        return Gain.of(self.goals, theirs, ours).may_exceed(CLOSE)

    def in_turns(self, wanted: Sequence[Mapping[str, Any]], rounds: range, what: str) -> None:
        """Measure each in every round, one after the other, and the other way round in the next; rounds that are whole
        are not measured again. One that was interrupted is measured anew: its other half would be of another day.
        """
        missing: list[tuple[int, Mapping[str, Any]]] = []
        for number in rounds:
            runs = {
                key_of(arguments): trial
                for arguments in wanted
                for trial in self.journal.measured(arguments)
                if trial.round == number
            }
            new = [each for each in wanted if key_of(each) not in runs and not self._problem(each)]
            if new and any(map(self.journal.is_left, runs.values())):
                new = list(wanted)
            missing += [(number, arguments) for arguments in (new if number % 2 else new[::-1])]
        with trial_bar(self.show, len(missing), what) as bar:
            for number, arguments in missing:
                bar.set_postfix_str(arguments_text(arguments))
                if not self._problem(arguments):
                    try:
                        found = measure(self.planner.model, {**self.planner.fixed, **arguments}, self.workload)
                    except (JaxLLMError, RuntimeError, MemoryError) as error:
                        problem = str(error) or type(error).__name__
                        self.journal.add(
                            Trial(kind=MEASURED, arguments=dict(arguments), numbers=None, problem=problem, round=number)
                        )
                    else:
                        self._keep(MEASURED, arguments, found, number)
                bar.update()

    def _problem(self, arguments: Mapping[str, Any]) -> str:
        """Why an engine failed in one of its rounds; "": none has."""
        return next((trial.problem for trial in self.journal.measured(arguments) if trial.problem), "")

    def _keep(self, kind: str, arguments: Mapping[str, Any], found: MeasuredRun, number: int = 0) -> None:
        numbers = self.goals.numbers(found.run)
        self.journal.add(Trial(kind=kind, arguments=dict(arguments), numbers=numbers, round=number))

    def fastest(self, wanted: Sequence[Mapping[str, Any]], rounds: range | None = None) -> Trial:
        """Of those that were measured, the best by its medians of some rounds, or of all, among those that are better
        than the defaults beyond what rounds differ by: where none is, the defaults. Of those that the best is not shown
        to be better than, the one with fewest values.
        """
        found = [each for each in wanted if self.journal.numbers(each, rounds)]
        if not found:
            problems = [problem for each in wanted if (problem := self._problem(each))]
            raise ValidationError(f"no engine could be measured: {next(iter(problems), 'nothing was tried')}")
        # of all rounds up to these, in whichever race
        known = None if rounds is None else range(rounds.stop)
        found = [each for each in found if not each or self._brings(each, {}, known)] or found
        best = found[0]
        for each in found[1:]:
            ours, theirs = self._beside(best, each, rounds)
            if ours and self.goals.rank(medians(theirs)) < self.goals.rank(medians(ours)):
                best = each
        as_good = [each for each in found if len(each) < len(best) and not self._brings(best, each, known)]
        chosen = min(as_good, key=len, default=best)
        numbers = medians([*self.journal.numbers(chosen, rounds).values()])
        return Trial(kind=MEASURED, arguments=dict(chosen), numbers=numbers)

    def gain(self, ours: Mapping[str, Any], theirs: Mapping[str, Any], rounds: range | None = None) -> Gain | None:
        """Of some arguments over others, in those of some rounds, or of all, in which both ran; None: there is none."""
        pairs = self._beside(ours, theirs, rounds)
        return Gain.of(self.goals, *pairs) if pairs[0] else None

    def _brings(self, ours: Mapping[str, Any], theirs: Mapping[str, Any], rounds: range | None) -> bool:
        """Whether some arguments are shown to be better than others, or to come nearer to constraints, or keep what
        those miss; of what never ran beside each other, nothing is known that speaks against it.
        """
        us, them = self._beside(ours, theirs, rounds)
        if not us:
            return True
        missed = max(self.goals.excess(medians(us)), 0.0)
        if self.goals.excess(medians(them)) > missed:
            over = [[1 + max(self.goals.excess(run), 0.0) for run in runs] for runs in (us, them)]
            return not missed or Gain(tuple(np.divide(over[1], over[0]) - 1)).is_shown
        gain = Gain.of(self.goals, us, them)
        return gain.is_shown and gain.mean > AS_GOOD

    def _beside(
        self, ours: Mapping[str, Any], theirs: Mapping[str, Any], rounds: range | None = None
    ) -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
        """What was measured of both in the rounds in which both ran."""
        us, them = self.journal.numbers(ours, rounds), self.journal.numbers(theirs, rounds)
        common = [number for number in us if number in them]
        return [us[number] for number in common], [them[number] for number in common]

    def effect(self, effect: Effect, best: Mapping[str, Any], without: Mapping[str, Any]) -> Effect:
        """The effect as it was measured, in the rounds that both had; as it was simulated, where there were none."""
        _, rest = self._beside(best, without)
        gain = self.gain(best, without)
        if gain is None:
            return effect
        return dataclasses.replace(effect, without=medians(rest), gain=gain.mean, measured=gain, problem="")


def trial_bar(show: bool | Callable[..., Any], total: int, what: str) -> Any:
    """A progress bar of trials.

    Args:
        show: whether it is seen, or what makes it, with tqdm's arguments.
    """
    make = show if callable(show) else bar_class()
    return make(total=total, desc=what, unit="trial", dynamic_ncols=True, disable=not show)
