"""What a search has found."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.autotuning.gain import Gain
from jaxllm.autotuning.goals import Goals, gain_text
from jaxllm.autotuning.knob import Knob, Space
from jaxllm.autotuning.search import AS_GOOD
from jaxllm.autotuning.trials import UNTRIED, Journal, Trial


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finalist:
    """Some arguments, simulated and perhaps measured."""

    #: those that are not the engine's own defaults
    arguments: Mapping[str, Any]
    #: of `Goals.numbers`; None: they are not simulated
    simulated: Mapping[str, float] | None
    #: of each round
    measured: tuple[Mapping[str, float], ...] = ()
    #: over the defaults, in the rounds in which both ran; None: there are none, or it is them
    gain: Gain | None = None

    @classmethod
    def of(cls, journal: Journal, arguments: Mapping[str, Any], rounds: Iterable[int] | None = None) -> Finalist:
        """What a journal has of some arguments; of what was measured, only those rounds."""
        simulated, runs = journal.simulated(arguments), journal.numbers(arguments)
        return cls(
            arguments=arguments,
            simulated=None if simulated is None else simulated.numbers,
            measured=tuple(runs[number] for number in (runs if rounds is None else rounds) if number in runs),
        )

    @property
    def numbers(self) -> Mapping[str, float]:
        """Medians of what was measured, where it was; else what was simulated."""
        if not self.measured:
            return self.simulated or {}
        return medians(self.measured)

    def spread(self, goals: Goals) -> float:
        """Between the rounds, relative to their median; 0 where there is but one."""
        values = [goals.value(run) for run in self.measured]
        return (max(values) - min(values)) / float(np.median(values)) if len(values) > 1 and np.median(values) else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """What a value of one knob brings: all else as it is in the best, and this one at its default."""

    knob: Knob
    value: Any
    #: of the run with the default; None: there is no such engine
    without: Mapping[str, float] | None
    #: by how much the objective is better with the value, relative to the default
    gain: float
    #: the same in each round in which both ran; None: it was simulated
    measured: Gain | None = None
    #: why there is no engine with the default; "": there is
    problem: str = ""

    @property
    def is_measured(self) -> bool:
        return self.measured is not None

    def text(self, goals: Goals) -> str:
        """The effect, in half a sentence."""
        default = self.knob.shown(self.knob.default)
        how = "measured" if self.is_measured else "simulated"
        if self.problem == UNTRIED:
            return f"nobody has tried the default ({default}) with the other values"
        if self.without is None:
            return f"with the default ({default}) there is no such engine: {self.problem.split('. ')[0]}"
        missed = goals.excess(self.without)
        also = f", and constraints missed by {missed:.0%}" if missed > 0 else ""
        told = f"{goals.text(self.without)} with that{also}"
        gain = gain_text(self.gain) if self.measured is None else self.measured.text()
        alone = "" if self.measured is None or self.measured.is_shown else "; no gain by itself that the rounds show"
        return f"{gain} against the default ({default}), {how}: {told}{alone}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningResult:
    """The best settings that were found, and all that was tried. Shows itself in a notebook."""

    model: str
    #: what it ran on, or what it was simulated for
    device: str
    workload: str
    goals: Goals
    #: arguments that were held fixed
    fixed: Mapping[str, Any]
    space: Space
    trials: tuple[Trial, ...]
    #: the engine's own defaults; where they ran beside the best, both are of those rounds
    base: Finalist
    #: the defaults, where nothing was measured to be better
    best: Finalist
    #: that were measured, the base among them; in the simulator alone, the best few
    finalists: tuple[Finalist, ...]
    #: of each knob that is not at its default
    effects: tuple[Effect, ...]
    #: how far off this may be
    uncertainty: str
    #: Ctrl-C came before everything was tried
    interrupted: bool = False

    @property
    def is_measured(self) -> bool:
        return bool(self.best.measured)

    @property
    def feasible(self) -> bool:
        """Whether all constraints are kept."""
        return self.goals.excess(self.best.numbers) <= 0

    @property
    def arguments(self) -> dict[str, Any]:
        """For the engine: `LLM(model, **result.arguments)`."""
        return {**self.fixed, **self.best.arguments}

    @property
    def gain(self) -> float:
        """By how much the objective is better than with the defaults: 0.1 is ten percent. 0 where nobody knows, since
        the best was measured and the defaults were not.
        """
        if self.best.gain is not None:
            return self.best.gain.mean
        comparable = self.base.numbers and not self.is_measured
        return self.goals.gain(self.best.numbers, self.base.numbers) if comparable else 0.0

    def gain_text(self) -> str:
        """How the best compares with the defaults, and how sure that is; "" where nobody knows."""
        if self.is_measured and all(name in self.space.left for name in self.best.arguments):
            return self._rival_text()
        if self.best.gain is not None:
            return f"the best is {self.best.gain.text()}"
        return "" if self.is_measured or not self.base.numbers else f"the best is {gain_text(self.gain)}"

    def _rival_text(self) -> str:
        """Of the one that came nearest to be better than the defaults, and is not shown to be."""
        missed = max(self.goals.excess(self.best.numbers), 0.0)
        gains = [
            (gain.mean, f"{arguments_text(each.arguments)}: {gain.text()}")
            for each in self.finalists
            if (gain := each.gain) is not None and self.goals.excess(each.numbers) <= missed
        ]
        if not gains:
            return ""
        return f"the rounds show no gain of more than {AS_GOOD:.1%} by anything else; the most was {max(gains)[1]}"

    def verdict(self) -> str:
        """Whether the constraints are kept; if not, what comes nearest."""
        if self.feasible:
            return ""
        missed = [each for each in self.goals.held if each.excess(self.best.numbers) > 0]
        return (
            f"Nothing that was tried keeps {' and '.join(map(str, missed))}. The nearest: "
            f"{self.goals.text(self.best.numbers)}. Ask for less, send requests more slowly, or take a faster device, "
            "a smaller model or quantized weights."
        )

    def front(self) -> list[Finalist]:
        """Simulated settings that no other one beats in both throughput and median latency, the fastest first."""
        found: dict[str, Finalist] = {}
        for trial in self.trials:
            if trial.kind == "simulated" and trial.numbers is not None:
                found[trial.key] = Finalist(arguments=trial.arguments, simulated=trial.numbers)
        front: list[Finalist] = []
        for each in sorted(found.values(), key=lambda one: (one.numbers["e2e_p50"], -one.numbers["throughput"])):
            if not front or each.numbers["throughput"] > front[-1].numbers["throughput"]:
                front.append(each)
        return front

    def __str__(self) -> str:
        how = "measured" if self.is_measured else "simulated"
        simulated = sum(trial.kind == "simulated" for trial in self.trials)
        runs = len(self.trials) - simulated
        compared = f" ({self.gain_text()})" if self.gain_text() else ""
        lines = [
            f"{self.model} on {self.device}: {self.goals}",
            f"workload: {self.workload}",
            f"tried {simulated} settings in the simulator, and measured {runs} runs"
            + (" (interrupted: this is the best so far)" if self.interrupted else ""),
            *([self.verdict()] if self.verdict() else []),
            f"best, {how}: {self.goals.text(self.best.numbers)}",
            *([f"defaults, {'measured' if self.base.measured else 'simulated'}: {self.goals.text(self.base.numbers)}"
               f"{compared}"] if self.base.numbers else []),
        ]  # fmt: skip
        if not self.effects:
            lines.append("  the engine's own defaults are the best that was found")
        for effect in self.effects:
            lines.append(f"  {effect.knob.name}: {effect.knob.shown(effect.value)}")
            lines.append(f"      {effect.text(self.goals)}")
        lines.append(self.uncertainty)
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from jaxllm.autotuning.page import body

        return body(self)

    def to_yaml(self) -> str:
        """For ``--config``: the arguments, each with its reason and its effect."""
        from jaxllm.autotuning.config_file import config_text

        return config_text(self)

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write ``config.yaml`` and ``report.html``; return both."""
        from jaxllm.autotuning.page import page

        folder.mkdir(parents=True, exist_ok=True)
        config, report = folder / "config.yaml", folder / "report.html"
        config.write_text(self.to_yaml(), encoding="utf-8")
        report.write_text(page(self), encoding="utf-8")
        return config, report

    def to_dict(self) -> dict[str, Any]:
        """Of what JSON knows."""
        return {
            "model": self.model,
            "device": self.device,
            "workload": self.workload,
            "objective": self.goals.objective,
            "constraints": [str(each) for each in self.goals.constraints],
            "feasible": self.feasible,
            "interrupted": self.interrupted,
            "arguments": self.arguments,
            "gain": _plain(self.gain),
            "best": _finalist_dict(self.best),
            "base": _finalist_dict(self.base),
            "finalists": [_finalist_dict(each) for each in self.finalists],
            "effects": [
                {
                    "argument": effect.knob.name,
                    "value": effect.value,
                    "default": effect.knob.default,
                    "gain": _plain(effect.gain),
                    "measured": effect.is_measured,
                    "rounds": _gain_dict(effect.measured),
                }
                for effect in self.effects
            ],
            "not_searched": dict(self.space.left),
            "uncertainty": self.uncertainty,
            "trials": [trial.to_dict() for trial in self.trials],
        }


def _plain(gain: float) -> float | None:
    """JSON knows no infinity."""
    return gain if math.isfinite(gain) else None


def _finalist_dict(finalist: Finalist) -> dict[str, Any]:
    return {
        "arguments": dict(finalist.arguments),
        "simulated": None if finalist.simulated is None else dict(finalist.simulated),
        "measured": [dict(run) for run in finalist.measured],
        "gain": _gain_dict(finalist.gain),
    }


def _gain_dict(gain: Gain | None) -> dict[str, Any] | None:
    """With the bounds of 95% confidence."""
    if gain is None:
        return None
    bounds = {"mean": _plain(gain.mean), "low": _plain(gain.low), "high": _plain(gain.high)}
    return {**bounds, "values": [_plain(value) for value in gain.values], "shown": gain.is_shown}


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the numbers of at least one run."""
    return {name: float(np.median([run[name] for run in runs])) for name in runs[0]}


def arguments_text(arguments: Mapping[str, Any]) -> str:
    """Such as "max_num_seqs=8"; "defaults" where there is nothing."""
    return ", ".join(f"{name}={value}" for name, value in arguments.items()) or "defaults"


def table_html(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    cells = lambda row, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)  # noqa: E731
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{cells(heading, 'th')}</tr>{body}</table>"
