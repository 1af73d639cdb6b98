"""The search in the simulator: Optuna's tree of Parzen estimators, and then whatever is one value from the best."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.extras import how_to_install
from jaxllm.autotuning.goals import Goals
from jaxllm.autotuning.knob import Space
from jaxllm.autotuning.trials import Journal, Trial

#: values of a knob that are not worse than this share are as good: the default is taken. The second one is of devices
#: that are not there, of which no simulation is as close as that
AS_GOOD, AS_GOOD_ABSENT = 0.005, 0.02
#: where a trial has no numbers
_NO_SCORE, _NO_ENGINE = -1e9, 1e3

Try = Callable[[Mapping[str, Any]], Trial]
#: (what is done, the best so far)
Tell = Callable[[Trial], None]


def optuna() -> ModuleType:
    """The package. Raises ValidationError where it is not installed, saying how it would be."""
    try:
        import optuna as found
    except ImportError as error:
        raise ValidationError(
            f"jaxllm tune searches with Optuna, which cannot be imported ({error}): {how_to_install('tune')}."
        ) from None
    found.logging.set_verbosity(found.logging.ERROR)
    return found


class Search:
    """A search of one space, whose trials a journal keeps.

    Args:
        attempt: simulates some arguments.
        told: hears of every trial that is new.
        as_good: a share by which the best may be worse for the sake of a knob's default.
    """

    def __init__(
        self,
        space: Space,
        goals: Goals,
        journal: Journal,
        attempt: Try,
        *,
        seed: int = 0,
        told: Tell = lambda _: None,
        as_good: float = AS_GOOD,
    ) -> None:
        self.space, self.goals, self._journal = space, goals, journal
        self._attempt, self._told, self._seed, self._as_good = attempt, told, seed, as_good

    def run(self, num_trials: int) -> Trial | None:
        """Try so many, the defaults first, and then what is beside the best; None where no engine was possible.

        The trials are the same for the same seed, so that one that was interrupted goes on where it was: what the
        journal has is not simulated again.
        """
        if self.space.knobs:
            self._sample(min(num_trials, self.space.size))
            self._refine()
        else:
            self._trial({})
        best = self.best()
        return best if best is None else self._simplest(best)

    def best(self) -> Trial | None:
        """Of the trials so far."""
        found = [trial for trial in self._journal.trials if trial.kind == "simulated" and trial.numbers is not None]
        return min(found, key=lambda trial: self.goals.rank(trial.numbers or {}), default=None)

    def _sample(self, num_trials: int) -> None:
        library = optuna()

        with _silent():
            sampler = library.samplers.TPESampler(
                seed=self._seed,
                multivariate=True,
                n_startup_trials=max(8, num_trials // 4),
            )
            study = library.create_study(direction="maximize", sampler=sampler)
            for start in self._starts():
                study.enqueue_trial({knob.name: knob.values.index(start[knob.name]) for knob in self.space.knobs})
            for _ in range(num_trials):
                asked = study.ask()
                # places of values, since their order means something
                values = {
                    knob.name: knob.values[asked.suggest_int(knob.name, 0, len(knob.values) - 1)]
                    for knob in self.space.knobs
                }
                trial = self._trial(self.space.arguments(values))
                numbers = trial.numbers
                asked.set_constraint("excess", _NO_ENGINE if numbers is None else self.goals.excess(numbers))
                study.tell(asked, _NO_SCORE if numbers is None else self.goals.score(numbers))

    def _starts(self) -> Iterator[dict[str, Any]]:
        """The defaults, and the defaults with the extremes of each knob."""
        defaults = {knob.name: knob.default for knob in self.space.knobs}
        yield defaults
        for knob in self.space.knobs:
            for value in (knob.values[0], knob.values[-1]):
                if value != knob.default:
                    yield defaults | {knob.name: value}

    def _refine(self) -> None:
        """Go to what is better by another value of one knob, until there is none."""
        best = self.best()
        while best is not None:
            assert best.numbers is not None
            values, before = self.space.values(best.arguments), best
            for knob in self.space.knobs:
                for value in knob.values:
                    self._trial(self.space.arguments(values | {knob.name: value}))
            best = self.best()
            assert best is not None and best.numbers is not None and before.numbers is not None
            if self.goals.rank(best.numbers) >= self.goals.rank(before.numbers):
                return

    def _simplest(self, best: Trial) -> Trial:
        """The best with every knob at its default that makes no difference, all of them together."""
        first = best
        for knob in self.space.knobs:
            values = self.space.values(best.arguments)
            if values[knob.name] == knob.default:
                continue
            trial = self._trial(self.space.arguments(values | {knob.name: knob.default}))
            if trial.numbers is None or first.numbers is None:
                continue
            kept = self.goals.excess(trial.numbers) <= max(self.goals.excess(first.numbers), 0.0)
            if kept and self.goals.gain(trial.numbers, first.numbers) >= -self._as_good:
                best = trial
        return best

    def _trial(self, arguments: Mapping[str, Any]) -> Trial:
        found = self._journal.simulated(arguments)
        if found is None:
            found = self._journal.add(self._attempt(arguments))
            self._told(found)
        return found


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Optuna calls what it has had for years experimental, at every start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
