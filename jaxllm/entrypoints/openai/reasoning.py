"""What a model thinks before it answers stands between two marks."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable
from typing import Any

from jaxllm.config.structured_outputs import PARSERS
from jaxllm.entrypoints.openai.tools.calls import overlap

#: those that think in any case; their older templates leave the mark of the beginning to nobody
_ALWAYS = ("deepseek_r1",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningParser:
    """Tells reasoning from the answer, by the marks of a family of models.

    Args:
        name: of `PARSERS`.
        decode: a text of token ids, with its special tokens.
    """

    name: str
    decode: Callable[[list[int]], str]

    @classmethod
    def of(cls, name: str, tokenizer: Callable[[], Any]) -> ReasoningParser:
        """Return the parser of a name, for a model whose tokenizer is there when it is asked for."""
        return cls(name=name, decode=lambda ids: tokenizer().decode(ids, skip_special_tokens=False))

    def begins_inside(self, prompt: str | None) -> bool:
        """Return whether an answer to `prompt` begins with reasoning: most templates write the mark of its beginning,
        and an empty reasoning where none is wanted.
        """
        start, end = PARSERS[self.name]
        written = (prompt or "").rstrip()
        return written.endswith(start) or (self.name in _ALWAYS and not written.endswith(end))

    def split(self, text: str, done: bool, inside: bool) -> tuple[str, str, str | None]:
        """Return the reasoning and the answer, as far as they are certain; more text makes both longer. And while there
        is no answer, characters without which more text makes the reasoning that much longer; None: any may do more.

        Args:
            done: whether the text is all.
            inside: as `begins_inside` says.
        """
        start, end = PARSERS[self.name]
        written = text.lstrip()
        if not inside and not written.startswith(start):
            # it may become the mark
            return "", text if done or not start.startswith(written) else "", None
        if not done and inside and written and start.startswith(written):
            return "", "", None
        body = written.removeprefix(start)
        place = body.find(end)
        if place >= 0:
            return body[:place].strip("\n"), body[place + len(end) :].lstrip("\n"), None
        thought = body.lstrip("\n")
        reasoning = thought if done else thought[: len(thought) - overlap(thought, end)].rstrip("\n")
        return reasoning, "", end[0] + "\n" if reasoning and reasoning == thought else None

    def count(self, token_ids: list[int], inside: bool) -> int:
        """Return how many tokens of an answer are its reasoning; its marks belong to it.

        Args:
            inside: as `begins_inside` says.
        """
        start, end = PARSERS[self.name]
        text = self.decode(token_ids)
        if not inside and not text.lstrip().startswith(start):
            return 0
        if end not in text:
            return len(token_ids)
        # the first tokens whose text has the mark
        return bisect.bisect_left(range(len(token_ids)), True, key=lambda count: end in self.decode(token_ids[:count]))
