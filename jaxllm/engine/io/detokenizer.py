"""Text from tokens as they come, and the stop strings in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from jaxllm.api.sampling_params import SamplingParams

#: prompt tokens that a stream starts from: some decoders treat the first token of a text differently
PRIMING_TOKENS = 6
#: what stands for bytes that are no whole character
_NO_CHARACTER = "\ufffd"
#: a character has at most four bytes, so at most three tokens are a part of one
_PART_TOKENS = 3


class Detokenizer:
    """The text of one request's output.

    Text is only ever appended: bytes that are not yet a whole character wait for the tokens that complete it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], params: SamplingParams):
        self._tokenizer = tokenizer
        self._skip_special_tokens = params.skip_special_tokens
        self._prompt = prompt_token_ids
        #: None: nothing has been decoded
        self._stream: DecodeStream | None = None
        #: what the prompt's last tokens read as, where they are an unfinished character: the stream's first text may
        #: begin with it
        self._unfinished = ""
        #: special token -> its text, where no space is to stand between two of them
        self._specials: dict[int, str] = {}
        if not (params.spaces_between_special_tokens or params.skip_special_tokens):
            added = tokenizer.get_added_tokens_decoder()
            self._specials = {token_id: token.content for token_id, token in added.items() if token.special}
        self._after_special = False
        self._stop: list[str] = list(params.stop or ())
        self._include_stop = params.include_stop_str_in_output
        #: tokens that are still to come before one may complete a stop string
        self._unstoppable = params.min_tokens
        #: characters that may turn out to be the beginning of a stop string
        self._held = 0 if self._include_stop else max(map(len, self._stop), default=1) - 1
        self.text = ""
        self._delivered = 0

    def append(self, token_id: int) -> str | None:
        """Take one more token; returns the stop string that it completes, with `text` cut there.

        As in vLLM, a stop string does not count that one of the first `min_tokens` tokens completes.
        """
        piece = self._piece(token_id)
        self._unstoppable -= 1
        if not piece:
            return None
        before = len(self.text)
        self.text += piece
        if not self._stop or self._unstoppable >= 0:
            return None
        found = self._find_stop(before)
        if found is None:
            return None
        end, stop = found
        self.text = self.text[: end if self._include_stop else end - len(stop)]
        return stop

    def extend(self, token_ids: list[int], *, last: bool = False) -> None:
        """Take more tokens, and look for no stop string. `last`: no others follow."""
        if last and self._stream is None and not self._specials:
            text = self._all_at_once(token_ids)
            if text is not None:
                self.text = text
                return
        piece = self._piece if self._specials else self._decoded
        self.text += "".join([text for token_id in token_ids if (text := piece(token_id))])

    def _all_at_once(self, token_ids: list[int]) -> str | None:
        """The text of all tokens in a quarter of the time that it takes one by one; None where some are not whole
        characters, which depends on when one looks, or change the text of the prompt.
        """
        primer, before, unfinished = self._primer()
        text = self._decode(primer + token_ids)
        if unfinished or _NO_CHARACTER in text or not text.startswith(before):
            return None
        return text[len(before) :]

    def _primer(self) -> tuple[list[int], str, list[int]]:
        """The prompt's last tokens as far as they are whole characters, their text, and the tokens behind them, which
        may be the beginning of a character.
        """
        end = len(self._prompt)
        for size in range(PRIMING_TOKENS, PRIMING_TOKENS + _PART_TOKENS + 1):
            for cut in range(end, max(end - _PART_TOKENS, 0) - 1, -1):
                primer = self._prompt[max(0, end - size) : cut]
                text = self._decode(primer)
                if _NO_CHARACTER not in (text[:1], text[-1:]):
                    return primer, text, self._prompt[cut:]
        # There are replacement characters in the prompt itself.
        return [], "", self._prompt[-PRIMING_TOKENS:]

    def _find_stop(self, before: int) -> tuple[int, str] | None:
        """The stop string that ends first in the text behind `before`; of those that end together, as in vLLM, the
        first of the caller's list.
        """
        best = None
        for stop in self._stop:
            at = self.text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0 and (best is None or at + len(stop) < best[0]):
                best = (at + len(stop), stop)
        return best

    def _piece(self, token_id: int) -> str | None:
        piece = self._decoded(token_id)
        if not self._specials:
            return piece
        special, self._after_special, after = (
            self._specials.get(token_id),
            token_id in self._specials,
            self._after_special,
        )
        return special if special is not None and after else piece

    def _decoded(self, token_id: int) -> str | None:
        if self._stream is None:
            self._start()
        text = self._step(token_id)
        if text and self._unfinished:
            # Whether a token finishes the prompt's last character or shows that it is none, the output is what differs.
            text = text[len(os.path.commonprefix([text, self._unfinished])) :]
            self._unfinished = ""
        return text

    def _start(self) -> None:
        """Make the stream, and bring it behind the prompt."""
        primer, _, unfinished = self._primer()
        self._stream = DecodeStream(ids=primer, skip_special_tokens=self._skip_special_tokens)
        waiting: list[int] = []
        for token_id in unfinished:
            waiting = [] if self._step(token_id) else [*waiting, token_id]
        self._unfinished = self._decode(waiting) if waiting else ""

    def _step(self, token_id: int) -> str | None:
        assert self._stream is not None
        try:
            return self._stream.step(self._tokenizer, token_id)
        except Exception as error:  # the library raises a bare Exception
            if "Invalid prefix" not in str(error):
                raise
            # a token that changes the text before it: start anew from it
            self._stream, self._unfinished = DecodeStream(skip_special_tokens=self._skip_special_tokens), ""
            return self._stream.step(self._tokenizer, token_id)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def delta(self, finished: bool) -> str:
        """Text that has not been delivered yet, without what may still become a stop string."""
        end = len(self.text) if finished else max(len(self.text) - self._held, self._delivered)
        piece = self.text[self._delivered : end]
        self._delivered = end
        return piece

    def visible(self, finished: bool) -> str:
        """All text so far, without what may still become a stop string."""
        return self.text if finished or not self._held else self.text[: max(0, len(self.text) - self._held)]
