"""The pictures of a prompt are read, counted, and put in the places that its tokens leave for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.config.media import MediaLimit
from jaxllm.multimodal.access import MediaAccess
from jaxllm.multimodal.conversations import has_media, without_media
from jaxllm.multimodal.items import IMAGE, VIDEO, Media, PlacedItem, PromptMedia
from jaxllm.multimodal.positions import rope_offsets
from jaxllm.multimodal.qwen_processor import PLACEHOLDERS, QwenProcessor

#: of a prompt
MEDIA_KEYS = ("multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs")


class MediaReader:
    """Reads what prompts hold besides text, for one model; safe to use from several threads.

    Args:
        processors: of each modality.
        tokens: modality -> the token that stands for one item in a prompt, and for each of its vectors in what the
            model computes.
        limits: of each modality that is on.
        max_tokens: vectors of the largest item that the plan has room for.
        access: what conversations may have read.
    """

    def __init__(
        self,
        processors: Mapping[str, QwenProcessor],
        tokens: Mapping[str, int],
        limits: Mapping[str, MediaLimit],
        *,
        max_tokens: int,
        access: MediaAccess,
    ):
        self._processors, self._tokens, self._limits = processors, tokens, limits
        self._max_tokens, self._access = max_tokens, access

    def of_conversation(self, prompt: Mapping[str, Any]) -> Mapping[str, Any]:
        """A prompt with `messages` whose pictures have become its `multi_modal_data`.

        Raises:
            ValidationError: one may not be read, or there are too many.
        """
        return without_media(prompt, self._access, PLACEHOLDERS) if has_media(prompt["messages"]) else prompt

    def read(self, prompt: Mapping[str, Any]) -> list[Media]:
        """What a prompt holds, of each modality in the caller's order.

        Raises:
            ValidationError: one cannot be read, is too large, or there are too many.
        """
        data = prompt.get("multi_modal_data") or {}
        uuids = prompt.get("multi_modal_uuids") or {}
        for name, given in (("multi_modal_data", data), ("multi_modal_uuids", uuids)):
            if not isinstance(given, Mapping):
                raise ValidationError(f'{name} must be a dict such as {{"image": ...}}, got {given!r:.80}')
        options, found = prompt.get("mm_processor_kwargs"), []
        processors = {modality: own.with_options(options) for modality, own in self._processors.items()}
        for modality, given in data.items():
            each = _videos(given) if modality == VIDEO else _images(given)
            if not each:
                continue
            self._check_count(modality, len(each))
            names, read = _uuids(uuids.get(modality), modality, len(each)), getattr(processors[modality], modality)
            for number, (item, uuid) in enumerate(zip(each, names, strict=True)):
                label = modality if len(each) == 1 else f"{modality} {number}"
                found.append(self._checked(read(item, name=label, uuid=uuid), label))
        return found

    def _check_count(self, modality: str, count: int) -> None:
        if modality not in self._tokens:
            known = ", ".join(self._tokens)
            raise ValidationError(f"multi_modal_data has {modality!r}, which the model does not take; it takes {known}")
        limit = self._limits.get(modality, MediaLimit()).count
        if count > limit:
            raise ValidationError(
                f"At most {limit} {modality}(s) may be provided in one prompt, and this one has {count}. "
                f"limit_mm_per_prompt={{{modality!r}: {count}}} allows them."
            )

    def _checked(self, media: Media, label: str) -> Media:
        if (count := media.items[0].num_tokens) > self._max_tokens:
            most = self._max_tokens * self._processors[media.modality].factor ** 2
            each = "" if media.modality == IMAGE else " for every two frames"
            raise ValidationError(
                f"{label} becomes {count} tokens{each}, and the engine has planned for {self._max_tokens} an item. "
                f'Pass mm_processor_kwargs={{"max_pixels": {most}}}, or start the engine with larger sizes in '
                "limit_mm_per_prompt, or a larger max_model_len."
            )
        return media

    def place(self, token_ids: list[int], given: Sequence[Media]) -> tuple[list[int], PromptMedia]:
        """Put pictures and videos into the places that a prompt has for them: one token each, or as many as it has
        vectors.

        Returns:
            (token_ids, media): the tokens with one for each vector.

        Raises:
            ValidationError: the prompt has another number of places.
        """
        of_token = {token: modality for modality, token in self._tokens.items()}
        waiting = {modality: [media for media in given if media.modality == modality] for modality in self._tokens}
        found: list[int] = []
        placed: list[tuple[Media, int]] = []
        counts, at = dict.fromkeys(self._tokens, 0), 0
        while at < len(token_ids):
            token = token_ids[at]
            modality = of_token.get(token)
            if modality is not None:
                counts[modality] += 1
            if modality is None or not waiting[modality]:
                found.append(token)
                at += 1
                continue
            media = waiting[modality].pop(0)
            # a prompt that an earlier output shows has a token for each vector already
            last = at + media.num_tokens
            is_whole = token_ids[at:last] == [token] * media.num_tokens and token_ids[last : last + 1] != [token]
            placed.append((media, len(found)))
            found += [token] * media.num_tokens
            at = last if is_whole else at + 1
        for modality, left in waiting.items():
            number = sum(media.modality == modality for media in given)
            if left or (number and counts[modality] > number):
                raise ValidationError(
                    f"Expected there to be {number} prompt placeholders corresponding to {number} {modality} items, "
                    f"but instead found {counts[modality]} prompt placeholders! The prompt needs one {modality} token "
                    f"(id {self._tokens[modality]}) for each."
                )
        offsets, delta = rope_offsets(placed, len(found), self._processors[given[0].modality].merge_size)
        return found, PromptMedia(tuple(_items(placed)), offsets, delta)


def _items(placed: Sequence[tuple[Media, int]]) -> Iterator[PlacedItem]:
    for media, start in placed:
        for number, item in enumerate(media.items):
            stop = start + item.num_tokens
            yield PlacedItem(item, start, stop, f"{media.modality} {item.content_hash} {number * media.time_step}")
            start = stop


def _images(given: Any) -> list[Any]:
    if given is None:
        return []
    if isinstance(given, np.ndarray) and given.ndim == 4:
        return list(given)
    return list(given) if isinstance(given, list | tuple) else [given]


def _videos(given: Any) -> list[Any]:
    """One is an array, a list of frames, or a pair of these and of what is known of them."""
    if given is None:
        return []
    if isinstance(given, np.ndarray) and given.ndim == 5:
        return list(given)
    if not isinstance(given, list):
        return [given]
    if not given:
        return []
    of_frames = all(np.ndim(frame) <= 3 if isinstance(frame, np.ndarray) else _is_frame(frame) for frame in given)
    return [given] if of_frames else given


def _is_frame(given: Any) -> bool:
    return not isinstance(given, list | tuple | str | bytes)


def _uuids(given: Any, modality: str, count: int) -> list[str | None]:
    if given is None:
        return [None] * count
    each = [given] if isinstance(given, str) else given
    if not isinstance(each, list | tuple) or len(each) != count:
        raise ValidationError(
            f"multi_modal_uuids[{modality!r}] must have one text or None for each of the {count} items, got "
            f"{given!r:.80}"
        )
    if any(not (uuid is None or (isinstance(uuid, str) and uuid)) for uuid in each):
        raise ValidationError(f"multi_modal_uuids[{modality!r}] must be texts or None, got {given!r:.80}")
    return [None if uuid is None else f"uuid {uuid}" for uuid in each]
