"""What would have helped: an argument, its value, and what was seen that says so."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """An argument and a value for it."""

    argument: str
    value: Any
    #: what else it does, or where it holds; "": nothing worth a word
    note: str = ""

    def __str__(self) -> str:
        return f"{self.argument}={self.value!r}{f' ({self.note})' if self.note else ''}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """One thing that hurt, and its remedy."""

    #: such as "preemptions"; `jaxllm.tuning.advice.advise.RULES` has all of them
    kind: str
    #: a sentence without an end
    evidence: str
    #: the numbers of that sentence, for programs
    numbers: Mapping[str, float]
    #: what to set
    setting: Setting
    #: what would do instead, each by itself
    instead: tuple[Setting, ...] = ()

    @property
    def argument(self) -> str:
        return self.setting.argument

    @property
    def value(self) -> Any:
        return self.setting.value

    def __str__(self) -> str:
        others = "".join(f"\n    or {other}" for other in self.instead)
        return f"{self.kind}: {self.evidence}\n    set {self.setting}{others}"

    def to_dict(self) -> dict[str, Any]:
        """Of what JSON knows."""
        return {
            "kind": self.kind,
            "evidence": self.evidence,
            "numbers": dict(self.numbers),
            **self.setting._asdict(),
            "instead": [other._asdict() for other in self.instead],
        }


class AdviceList(tuple[Advice, ...]):
    """Pieces of advice; prints as a text, and shows itself in a notebook."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "Nothing that was seen asks for another value of an argument."

    __repr__ = __str__

    def _repr_html_(self) -> str:
        if not self:
            return f"<p>{self}</p>"
        rows = "".join(
            f"<tr><td>{html.escape(each.kind)}</td><td style='text-align:left'>{html.escape(each.evidence)}</td>"
            f"<td style='text-align:left'><code>{html.escape(str(each.setting))}</code>"
            + "".join(f"<br>or <code>{html.escape(str(other))}</code>" for other in each.instead)
            + "</td></tr>"
            for each in self
        )
        return f"<table><tr><th>what</th><th>seen</th><th>set</th></tr>{rows}</table>"

    def of(self, kind: str) -> Advice | None:
        """The one of this kind; None: there is none."""
        return next((each for each in self if each.kind == kind), None)
