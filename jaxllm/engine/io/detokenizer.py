"""Text from tokens as they come, and the stop strings in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from jaxllm.api.sampling_params import SamplingParams

#: prompt tokens that a stream starts from: some decoders treat the first token of a text differently
PRIMING_TOKENS = 6
#: what stands for bytes that are no whole character
_NO_CHARACTER = "\ufffd"


class Detokenizer:
    """The text of one request's output.

    Text is only ever appended: bytes that are not yet a whole character wait for the tokens that complete it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], params: SamplingParams):
        self._tokenizer = tokenizer
        self._skip_special_tokens = params.skip_special_tokens
        self._primer = prompt_token_ids[-PRIMING_TOKENS:]
        #: None: nothing has been decoded
        self._stream: DecodeStream | None = None
        #: special token -> its text, where no space is to stand between two of them
        self._specials: dict[int, str] = {}
        if not (params.spaces_between_special_tokens or params.skip_special_tokens):
            added = tokenizer.get_added_tokens_decoder()
            self._specials = {token_id: token.content for token_id, token in added.items() if token.special}
        self._after_special = False
        self._stop: list[str] = list(params.stop or ())
        self._include_stop = params.include_stop_str_in_output
        #: characters that may turn out to be the beginning of a stop string
        self._held = 0 if self._include_stop else max(map(len, self._stop), default=1) - 1
        self.text = ""
        self._delivered = 0

    def append(self, token_id: int, *, find_stop: bool = True) -> str | None:
        """Take one more token; returns the stop string that it completes, with `text` cut there."""
        piece = self._piece(token_id)
        if not piece:
            return None
        before = len(self.text)
        self.text += piece
        if not self._stop or not find_stop:
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
        decode = self._tokenizer.decode
        before = decode(self._primer, skip_special_tokens=self._skip_special_tokens)
        text = decode(self._primer + token_ids, skip_special_tokens=self._skip_special_tokens)
        if _NO_CHARACTER in text or not text.startswith(before):
            return None
        return text[len(before) :]

    def _find_stop(self, before: int) -> tuple[int, str] | None:
        """The stop string that ends first in the text behind `before`; of those that end together the longest."""
        best = None
        for stop in self._stop:
            at = self.text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0 and (best is None or (at + len(stop), -len(stop)) < (best[0], -len(best[1]))):
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
            self._stream = DecodeStream(ids=self._primer, skip_special_tokens=self._skip_special_tokens)
        try:
            return self._stream.step(self._tokenizer, token_id)
        except Exception as error:  # the library raises a bare Exception
            if "Invalid prefix" not in str(error):
                raise
            # a token that changes the text before it: start anew from it
            self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            return self._stream.step(self._tokenizer, token_id)

    def delta(self, finished: bool) -> str:
        """Text that has not been delivered yet, without what may still become a stop string."""
        end = len(self.text) if finished else max(len(self.text) - self._held, self._delivered)
        piece = self.text[self._delivered : end]
        self._delivered = end
        return piece

    def visible(self, finished: bool) -> str:
        """All text so far, without what may still become a stop string."""
        return self.text if finished or not self._held else self.text[: max(0, len(self.text) - self._held)]
