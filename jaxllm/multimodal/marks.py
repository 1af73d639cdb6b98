"""How a family writes in a prompt that a picture stands there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.multimodal.items import IMAGE, VIDEO


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marks:
    """Of one family."""

    #: modality -> what stands for an item in the text of a message
    placeholders: Mapping[str, str]
    #: of a family whose texts have the first of three tokens alone, where the model reads all three, an empty line on
    #: either side: before a picture's vectors, in their place, behind them; (): texts are read as they are
    around: tuple[str, ...] = ()

    def in_text(self, text: str) -> str:
        """A text with what the model reads around each picture."""
        if not self.around:
            return text
        begin, place, end = self.around
        alone = f"{re.escape(begin)}(?!{re.escape(place)})"
        return re.sub(alone, lambda _: f"\n\n{begin}{place}{end}\n\n", text)

    def in_tokens(self, token_ids: Sequence[int], tokenizer: Any) -> list[int]:
        """The same of tokens.

        Args:
            tokenizer: None: there is none, and nothing is put in.
        """
        if not self.around or tokenizer is None:
            return list(token_ids)
        begin = self.token(self.around[0], tokenizer)
        if begin not in token_ids:
            return list(token_ids)
        ids = [begin, *(self.token(mark, tokenizer) for mark in self.around[1:])]
        found, line, place = [], None, ids[1]
        for token, follows in zip(token_ids, [*token_ids[1:], -1], strict=True):
            if token != begin or follows == place:
                found.append(token)
                continue
            line = line or list(tokenizer.encode("\n\n", add_special_tokens=False))
            found += [*line, *ids, *line]
        return found

    @staticmethod
    def token(mark: str, tokenizer: Any) -> int:
        """The id of a mark. Raises ValidationError where the tokenizer has none."""
        token = tokenizer.convert_tokens_to_ids(mark)
        if token is None or tokenizer.convert_ids_to_tokens(token) != mark:
            raise ValidationError(f"the tokenizer has no token {mark!r}, which this model's prompts have for images")
        return token


QWEN = Marks(
    placeholders={
        IMAGE: "<|vision_start|><|image_pad|><|vision_end|>",
        VIDEO: "<|vision_start|><|video_pad|><|vision_end|>",
    }
)
GEMMA = Marks(
    placeholders={IMAGE: "<start_of_image>"},
    around=("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
)
LLAVA = Marks(placeholders={IMAGE: "<image>"})
