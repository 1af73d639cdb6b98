"""Processes that run an engine together have to be given the same requests: who is given another one is told so, since
each would wait for ever for what the others do not do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError

if TYPE_CHECKING:
    from jaxllm.engine.io.feed import Job

#: where an object lies, which differs from process to process
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Agreement:
    """Compares what is asked for with what is asked for in the other processes. All of them have to ask.

    Args:
        differing: texts -> None where all processes have the same; else the place of the first that differs, and what
            it is in each process.
    """

    def __init__(self, differing: Callable[[Sequence[str]], tuple[int, list[str]] | None]):
        self._differing = differing

    def check_jobs(self, jobs: Sequence[Job], first: int, *, is_all: bool) -> None:
        """Compare prompts of a call.

        Args:
            first: the number of the first of them.
            is_all: no others follow.

        Raises:
            ValidationError: another process has others.
        """
        told = [("the number of prompts", f"{first + len(jobs)}{'' if is_all else ' or more'}")]
        for number, job in enumerate(jobs, first):
            told.append((f"prompts[{number}]", _text(job.prompt)))
            told.append((f"what is asked of prompts[{number}]", _text(job[2:])))
        self._check(told)

    def check_request(self, name: str, prompt: Any, params: Any) -> None:
        """Compare a single request. Raises ValidationError as `check_jobs` does."""
        given = {"the request": name, f"the prompt of {name!r}": prompt, f"what is asked of {name!r}": params}
        self._check([(what, _text(value)) for what, value in given.items()])

    def _check(self, told: Sequence[tuple[str, str]]) -> None:
        found = self._differing([text for _, text in told])
        if found is None:
            return
        place, each = found
        said = ", and ".join(f"{text} in process {number}" for number, text in enumerate(each))
        raise ValidationError(
            f"The {len(each)} processes of this engine must be given the same prompts, in the same order: "
            f"{told[place][0]} is {said}. None of them runs."
        )


def _text(value: Any) -> str:
    """A value as text that is the same in every process."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_text(part)}" for key, part in value.items()) + "}"
    if hasattr(value, "__array__"):
        import numpy as np

        array = np.asarray(value)
        return f"<{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()}>"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_text, value)) + ")"
    return _ADDRESS.sub("", repr(value))
