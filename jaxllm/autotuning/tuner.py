"""One search from its question to its result: calibrate, simulate, measure the best few in turns, and leave out each
value in turn to see what it brings.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.autotuning.capacity import Capacity, Planner
from jaxllm.autotuning.forecast import Forecast, StepTimesOf
from jaxllm.autotuning.goals import Goals
from jaxllm.autotuning.knob import DATA, STAGES, TENSOR, Knob, Space, fitting_grid
from jaxllm.autotuning.machine import Machine, trial_bar
from jaxllm.autotuning.question import SECRETS, base_arguments, check_question, question
from jaxllm.autotuning.result import Effect, Finalist, TuningResult
from jaxllm.autotuning.search import AS_GOOD, AS_GOOD_ABSENT, Search, optuna
from jaxllm.autotuning.trials import UNTRIED, Journal, Trial, key_of
from jaxllm.tuning.simulation.step_times import StepTimes
from jaxllm.tuning.simulation.workload import Workload

logger = logging.getLogger("jaxllm")

#: of what differs by less than this share, the simulator says that it is the same
SAME = 0.002


@dataclasses.dataclass(kw_only=True)
class Tuner:
    """A search.

    Args:
        folder: for what is found, and for what a search that was interrupted goes on with; None: nothing is kept.
        step_times: of engines on a device that is not there; None: they are measured, and so are the best few.
        fastest_steps: of the same, as fast as they can be; None: nobody knows.
        num_trials: that are sampled in the simulator.
        num_measured: of the best, that are measured beside the defaults; 0: none.
        rounds: of each, and up to three times as many of those that are close.
        show: whether there is a progress bar, or what makes it.
    """

    planner: Planner
    workload: Workload
    goals: Goals
    folder: Path | None = None
    step_times: StepTimesOf | None = None
    fastest_steps: StepTimesOf | None = None
    device: str = ""
    num_trials: int = 100
    num_measured: int = 3
    rounds: int = 3
    show: bool | Callable[..., Any] = True

    def run(self) -> TuningResult:
        """Search. Ctrl-C gives the best so far.

        Raises:
            ValidationError: the question cannot be asked, or no engine is possible.
            KeyboardInterrupt: nothing had been tried yet.
        """
        optuna()
        check_question(self.planner, self.workload)
        for name, least in (("num_trials", 1), ("num_measured", 0), ("rounds", 1)):
            if (value := getattr(self, name)) < least:
                raise ValidationError(f"{name} must be at least {least}, got {value}.")
        self._base = base_arguments(self.planner, self.workload)
        self.planner.hold(self._base)
        self.space = Space.of(self.planner, self.workload)
        if self._base:
            reason = "the model's own length does not fit, and this one serves the workload"
            self.space = dataclasses.replace(self.space, left={**self.space.left, **dict.fromkeys(self._base, reason)})
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValidationError(
                    f"{self.folder} cannot be made ({error.strerror or error}). Give another --output."
                ) from None
        path = None if self.folder is None else self.folder / "trials.jsonl"
        self.journal = Journal(path, question(self.planner, self.workload, self.goals, self.device))
        self._machine = Machine(
            planner=self.planner, workload=self.workload, goals=self.goals, journal=self.journal, folder=self.folder,
            show=self.show,
        )  # fmt: skip
        self._effects: tuple[Effect, ...] = ()
        self._finalists: list[Mapping[str, Any]] = []
        self._best: Trial | None = None
        interrupted = False
        try:
            times = self.step_times or self._calibrate()
            self._simulate(Forecast(self.planner, self.workload, self.goals, times))
            if self.step_times is None and self.num_measured:
                self._measure_best()
        except KeyboardInterrupt:
            interrupted = True
            self._best = self._best_so_far()
            if self._best is None:
                logger.warning("Interrupted before anything was measured: the same call or command begins again")
                raise
            self._effects = self._known_effects()
        return self._result(interrupted=interrupted)

    def _best_so_far(self) -> Trial | None:
        """Of what was measured, where the best of the simulator is among it; else that one."""
        best = self._best or self._search().best()
        if best is None or self.step_times is not None or not self.journal.measured(best.arguments):
            return best
        return self._machine.fastest(_distinct([{}, *self._finalists, best.arguments]))

    # The simulator.

    def _calibrate(self) -> StepTimesOf:
        """The times of steps as the defaults measure them, in a run of its own; of a model that is split over devices,
        as one with so many does.
        """
        found: dict[int, StepTimes] = {}

        def times(capacity: Capacity) -> StepTimes:
            devices = capacity.args.tensor_parallel_size
            if devices not in found:
                split = devices != (self.planner.fixed.get("tensor_parallel_size") or 1)
                found[devices] = self._machine.step_times({"tensor_parallel_size": devices} if split else {})
            return found[devices]

        times(self.planner.capacity(fitting_grid(self.planner, {})))
        return times

    def _search(self, forecast: Callable[[Mapping[str, Any]], Trial] | None = None, bar: Any = None) -> Search:
        def told(trial: Trial) -> None:
            if bar is not None:
                if bar.total is not None and bar.n >= bar.total:
                    bar.total += 1  # what is beside the best, of which nobody knows how much there will be
                bar.update()
                best = search.best()
                if best is not None and best.numbers is not None:
                    bar.set_postfix_str(self.goals.text(best.numbers), refresh=False)

        as_good = AS_GOOD if self.step_times is None else AS_GOOD_ABSENT
        search = Search(self.space, self.goals, self.journal, forecast or _nothing, told=told, as_good=as_good)
        return search

    def _simulate(self, forecast: Forecast) -> None:
        total = min(self.num_trials, self.space.size)
        with trial_bar(self.show, total, "Simulating") as bar:
            self._best = self._search(forecast, bar).run(total)
        if self._best is None:
            problems = dict.fromkeys(trial.problem for trial in self.journal.trials if trial.problem)
            raise ValidationError(f"no engine is possible: {next(iter(problems), 'nothing was tried')}")
        self._finalists = [trial.arguments for trial in self._top(max(self.num_measured, 3))]
        self._effects = self._effects_of(self._best.arguments, forecast)

    def _top(self, count: int) -> list[Trial]:
        """The best, each of which fares differently from the others."""
        assert self._best is not None
        found = [self._best]
        trials = [trial for trial in self.journal.trials if trial.kind == "simulated" and trial.numbers is not None]
        for trial in sorted(trials, key=lambda each: (*self.goals.rank(each.numbers or {}), len(each.arguments))):
            if len(found) >= count:
                break
            if not any(_alike(trial.numbers or {}, other.numbers or {}) for other in found):
                found.append(trial)
        return found

    def _effects_of(
        self, arguments: Mapping[str, Any], forecast: Callable[[Mapping[str, Any]], Trial]
    ) -> tuple[Effect, ...]:
        """Simulated, of each value that is no default."""
        effects = []
        with_all = self.journal.simulated(arguments)
        for knob, value, without in self._ablated(arguments):
            trial = self.journal.simulated(without)
            if trial is None:
                trial = forecast(without)
                if trial.problem != UNTRIED:
                    self.journal.add(trial)
            gain = 0.0
            if trial.numbers is not None and with_all is not None and with_all.numbers is not None:
                gain = self.goals.gain(with_all.numbers, trial.numbers)
            effects.append(Effect(knob=knob, value=value, without=trial.numbers, gain=gain, problem=trial.problem))
        return tuple(effects)

    def _ablated(self, arguments: Mapping[str, Any]) -> list[tuple[Knob, Any, dict[str, Any]]]:
        """Of each value that is no default: its knob, the value, and the arguments with the default in its place."""
        values = self.space.values(arguments)
        return [
            (knob, values[knob.name], self.space.arguments(values | {knob.name: knob.default}))
            for knob in self.space.all_knobs
            if values[knob.name] != knob.default
        ]

    # The machine.

    def _measure_best(self) -> None:
        """The defaults, the best few, and what is not simulated, in turns; then the best without each of its values."""
        assert self._best is not None
        # the defaults are measured in any case, and may be among the best
        few = [trial.arguments for trial in self._top(self.num_measured + 1) if trial.arguments][: self.num_measured]
        few += self._not_simulated(self._best.arguments)
        wanted = _distinct([{}, *few])
        self._finalists = wanted
        self._machine.foretell(2 * len(wanted) * self.rounds)
        self._best, after = self._machine.race(wanted, 1, self.rounds, "Measuring the best")
        # one of these may be faster, and has values of its own then, of which there is one less
        while not set(map(key_of, self._finalists)).issuperset(map(key_of, without := self._without_each())):
            again = _distinct([{}, self._best.arguments, *without])
            self._finalists = _distinct([*self._finalists, *again])
            self._best, after = self._machine.race(again, after, self.rounds, "Measuring each value")
        self._effects = self._known_effects()

    def _without_each(self) -> list[dict[str, Any]]:
        """The best with the default in place of each of its values, where there is such an engine."""
        assert self._best is not None
        best = self._best.arguments
        effects = zip(self._effects_of(best, _nothing), self._ablated(best), strict=True)
        return [without for effect, (_, _, without) in effects if effect.problem in ("", UNTRIED)]

    def _not_simulated(self, arguments: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        """The arguments with a value of each knob that is measured alone."""
        for knob in self.space.measured:
            for value in knob.values:
                if value == knob.default:
                    continue
                found = {**arguments, **knob.arguments(value)}
                if knob.name == STAGES:
                    # its devices are those that another split had, and its stages launch one step at a time
                    others = (TENSOR, DATA, "num_decode_steps")
                    found = {name: kept for name, kept in found.items() if name not in others}
                yield found

    def _known_effects(self) -> tuple[Effect, ...]:
        """Of the best: as they were measured, or else simulated; nothing more is tried for them."""
        assert self._best is not None
        best = self._best.arguments
        effects = zip(self._effects_of(best, _nothing), self._ablated(best), strict=True)
        return tuple(self._machine.effect(effect, best, without) for effect, (_, _, without) in effects)

    # The result.

    def _result(self, *, interrupted: bool) -> TuningResult:
        assert self._best is not None
        finalists = tuple(self._finalist(arguments) for arguments in self._finalists)
        fixed = {name: value for name, value in self.planner.fixed.items() if name not in SECRETS}
        base = {name: fixed.pop(name) for name in self._base}
        # what ran in other minutes, or was simulated, is no better or worse than what was measured
        common = self.journal.numbers(self._best.arguments).keys() & self.journal.numbers({}).keys()
        best = self._finalist(self._best.arguments, sorted(common) or None)
        defaults = self._finalist({}, sorted(common))
        return TuningResult(
            model=str(self.planner.model),
            device=self.device,
            workload=str(self.workload),
            goals=self.goals,
            fixed=fixed,
            space=self.space,
            trials=tuple(self.journal.trials),
            base=defaults,
            best=dataclasses.replace(best, arguments={**base, **best.arguments}),
            finalists=finalists,
            effects=self._effects,
            uncertainty=self._error() if self.step_times is None else self._range(),
            interrupted=interrupted,
        )

    def _finalist(self, arguments: Mapping[str, Any], rounds: Iterable[int] | None = None) -> Finalist:
        """With its gain over the defaults."""
        found = Finalist.of(self.journal, arguments, rounds)
        return dataclasses.replace(found, gain=self._machine.gain(arguments, {}) if arguments else None)

    def _error(self) -> str:
        """How far the simulator was from what was measured here."""
        pairs = [Finalist.of(self.journal, arguments) for arguments in _distinct([{}, *self._finalists])]
        found = []
        for name, text in (("throughput", "throughput"), ("ttft_p50", "the median TTFT")):
            errors = [
                each.simulated[name] / each.numbers[name] - 1
                for each in pairs
                if each.measured and each.simulated and each.numbers[name] and each.arguments
            ]
            if errors:
                found.append(f"{text} by {min(errors):+.0%} to {max(errors):+.0%}")
        if not found:
            return (
                "The simulator's steps were fitted to those of the defaults; nothing else was measured, so other "
                "settings may differ from this by tens of percent."
            )
        return (
            "The simulator, whose steps were fitted to those of the defaults, was off for the others in "
            f"{' and in '.join(found)}."
        )

    def _range(self) -> str:
        """What may come of the best on a device that nobody has asked."""
        assert self._best is not None
        fastest = ""
        if self.fastest_steps is not None:
            trial = Forecast(self.planner, self.workload, self.goals, self.fastest_steps)(self._best.arguments)
            if trial.numbers is not None:
                told = self.goals.text(trial.numbers)
                fastest = f" Were they all that its memory and its units can do, it would be {told}."
        return (
            "Nothing was measured. The memory plan is an estimate from shapes (activations within a factor of 1.5), "
            f"and steps take what the device's rates say, with a margin.{fastest} Programs of few tokens may be slower "
            "than either; where all steps change alike, settings keep their order. Measure on the device before you "
            "rely on a limit."
        )


def _nothing(arguments: Mapping[str, Any]) -> Trial:
    return Trial(kind="simulated", arguments=dict(arguments), numbers=None, problem=UNTRIED)


def _alike(some: Mapping[str, float], others: Mapping[str, float]) -> bool:
    return all(abs(some[name] - others[name]) <= SAME * abs(others[name]) for name in ("throughput", "e2e_mean"))


def _distinct(wanted: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return list({key_of(arguments): arguments for arguments in wanted}.values())
