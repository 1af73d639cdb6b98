"""What was tried: each run of some arguments, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError

#: kinds of runs; the calibrating one is measured in another minute than the rest, and is no round of theirs
SIMULATED, CALIBRATED, MEASURED = "simulated", "calibrated", "measured"
#: in place of a problem
UNTRIED = "it was not tried"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One run."""

    #: `SIMULATED`, `CALIBRATED` or `MEASURED`
    kind: str
    #: those that are not the engine's own defaults
    arguments: Mapping[str, Any]
    #: of `Goals.numbers`; None: there is no such engine
    numbers: Mapping[str, float] | None
    #: why there is none; "": there is
    problem: str = ""
    #: of measured ones, which of the rounds; 0: none
    round: int = 0

    @property
    def key(self) -> str:
        return key_of(self.arguments)

    def to_dict(self) -> dict[str, Any]:
        """Of what JSON knows."""
        return dataclasses.asdict(self)


def key_of(arguments: Mapping[str, Any]) -> str:
    """The same for equal arguments."""
    return json.dumps(dict(arguments), sort_keys=True, default=str)


class Journal:
    """Finished trials, each written before the next one begins.

    Args:
        path: a file of lines of JSON; None: nothing is kept.
        question: what is asked, of what JSON knows: trials of another question are not ours.

    Raises:
        ValidationError: the file has trials of another question, or is none of ours.
    """

    def __init__(self, path: Path | None, question: Mapping[str, Any]) -> None:
        self._path = path
        self.trials: list[Trial] = []
        self._simulated: dict[str, Trial] = {}
        #: how many of the trials an earlier run has left
        self.resumed = 0
        asked = json.loads(json.dumps({"question": question}, default=str))
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            self._read(path, asked)
        else:
            self._write(asked)

    def simulated(self, arguments: Mapping[str, Any]) -> Trial | None:
        """The simulated trial of such arguments; None: there is none yet."""
        return self._simulated.get(key_of(arguments))

    def calibrated(self, arguments: Mapping[str, Any]) -> Trial | None:
        """The run of such arguments that steps are learnt from; None: there is none."""
        key = key_of(arguments)
        return next((trial for trial in self.trials if trial.kind == CALIBRATED and trial.key == key), None)

    def measured(self, arguments: Mapping[str, Any]) -> list[Trial]:
        """The measured ones, in the order of their rounds; of a round that was measured anew, the last."""
        key = key_of(arguments)
        found = {trial.round: trial for trial in self.trials if trial.kind == MEASURED and trial.key == key}
        return [found[number] for number in sorted(found)]

    def numbers(self, arguments: Mapping[str, Any], rounds: range | None = None) -> dict[int, Mapping[str, float]]:
        """round -> what was measured in it; of some rounds, or of all."""
        return {
            trial.round: trial.numbers
            for trial in self.measured(arguments)
            if trial.numbers is not None and (rounds is None or trial.round in rounds)
        }

    def is_left(self, trial: Trial) -> bool:
        """Whether an earlier run has left it."""
        return any(trial is each for each in self.trials[: self.resumed])

    def add(self, trial: Trial) -> Trial:
        """Keep a finished trial."""
        self._keep(trial)
        self._write(trial.to_dict())
        return trial

    def _keep(self, trial: Trial) -> None:
        self.trials.append(trial)
        if trial.kind == SIMULATED:
            self._simulated[trial.key] = trial

    def _read(self, path: Path, asked: Any) -> None:
        try:
            content = path.read_bytes()
            # a line without an end is what a killed process left; whatever it was is done again
            whole = content[: content.rfind(b"\n") + 1]
            first, *lines = [json.loads(line) for line in whole.splitlines()] or [None]
            if first is not None and first != asked:
                raise ValidationError(
                    f"{path} has trials of another question ({_difference(first, asked)}). Give another --output, or "
                    "delete the file to begin anew."
                )
            for line in lines:
                self._keep(Trial(**line))
        except OSError as error:
            raise ValidationError(f"{path} cannot be read: {error.strerror or error}") from None
        except (ValueError, TypeError) as error:
            if isinstance(error, ValidationError):
                raise
            raise ValidationError(
                f"{path} is not a file of trials ({error!r:.100}). Give another --output, or delete it."
            ) from None
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        if first is None:
            self._write(asked)
        self.resumed = len(self.trials)

    def _write(self, line: Any) -> None:
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _difference(found: Any, asked: Any) -> str:
    before, now = (each.get("question", {}) if isinstance(each, dict) else {} for each in (found, asked))
    for name in now:
        if before.get(name) != now[name]:
            return f"{name}: {before.get(name)!r:.80} there, {now[name]!r:.80} here"
    return "it does not say which"
