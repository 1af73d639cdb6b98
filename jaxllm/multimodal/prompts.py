"""The pictures of a prompt are read, counted, and put in the places that its tokens leave for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.config.media import MediaLimit
from jaxllm.multimodal.access import MediaAccess
from jaxllm.multimodal.conversations import has_media, without_media
from jaxllm.multimodal.items import IMAGE, VIDEO, Media, PlacedItem, PromptMedia, Room
from jaxllm.multimodal.marks import Marks
from jaxllm.multimodal.pictures import MOST_DECODED, size_of_file
from jaxllm.multimodal.positions import rope_offsets
from jaxllm.multimodal.processor import Processor
from jaxllm.multimodal.processor_cache import ProcessorCache, content_key, time_key

#: of a prompt
MEDIA_KEYS = ("multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs")


def is_given(value: Any) -> bool:
    """Whether a prompt's key has something; arrays and tables, which are none of what it may have, do not say."""
    try:
        return bool(value)
    except Exception:
        return True


def _dict(prompt: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    given = prompt.get(name)
    if not is_given(given):
        return {}
    if not isinstance(given, Mapping):
        such = '"max_pixels"' if name == "mm_processor_kwargs" else '"image"'
        raise ValidationError(f"{name} must be a dict such as {{{such}: ...}}, got {given!r:.80}")
    return given


class MediaReader:
    """Reads what prompts hold besides text, for one model; safe to use from several threads.

    Args:
        processors: of each modality.
        tokens: modality -> the token that stands for one item in a prompt, and for each of its vectors in what the
            model computes.
        limits: of each modality that is on.
        max_tokens: vectors of the largest item that the plan has room for.
        max_model_len: vectors that all of a prompt's may have together.
        access: what conversations may have read.
        marks: how prompts say where pictures stand.
        has_axes: whether tokens have positions of three axes.
        tokenizer: None: the engine has none.
        cache: of what was prepared; None: there is none.
    """

    def __init__(
        self,
        processors: Mapping[str, Processor],
        tokens: Mapping[str, int],
        limits: Mapping[str, MediaLimit],
        *,
        max_tokens: int,
        max_model_len: int,
        access: MediaAccess,
        marks: Marks,
        has_axes: bool,
        tokenizer: Any = None,
        cache: ProcessorCache | None = None,
    ):
        self.cache = cache
        self._marks, self._has_axes, self._tokenizer = marks, has_axes, tokenizer
        self._processors, self._tokens, self._limits = processors, tokens, limits
        self._max_tokens, self._max_model_len, self._access = max_tokens, max_model_len, access

    def of_conversation(self, prompt: Mapping[str, Any]) -> Mapping[str, Any]:
        """A prompt with `messages` whose pictures have become its `multi_modal_data`.

        Raises:
            ValidationError: one may not be read, or there are too many.
        """
        if not has_media(prompt["messages"]):
            return prompt
        for name in MEDIA_KEYS:
            _dict(prompt, name)
        with _told("the messages"):
            return without_media(prompt, self._access, self._marks.placeholders, self._check_count, self._check_frames)

    def placeholder_ids(self, modality: str) -> list[int]:
        """What stands for an item in a prompt of tokens."""
        if self._tokenizer is None:
            raise ValidationError("the marks of images need a tokenizer, and skip_tokenizer_init=True")
        return list(self._tokenizer.encode(self._marks.placeholders[modality], add_special_tokens=False))

    def text_of(self, text: str) -> str:
        """A text with pictures as the model reads it."""
        return self._marks.in_text(text)

    def read(self, prompt: Mapping[str, Any]) -> list[Media]:
        """What a prompt holds, of each modality in the caller's order.

        Raises:
            ValidationError: one cannot be read, is too large, or there are too many.
        """
        data, uuids, options = (_dict(prompt, name) for name in MEDIA_KEYS)
        salt, found = prompt.get("cache_salt"), []
        processors = {modality: own.with_options(options) for modality, own in self._processors.items()}
        left = self._max_model_len
        for modality, given in data.items():
            each = _videos(given) if modality == VIDEO else _images(given)
            if given is None and is_given(uuids.get(modality)):
                each = [None]
            if not each:
                continue
            self._check_count(modality, len(each))
            names = _uuids(uuids.get(modality), modality, len(each), salt)
            frames = self._limits.get(modality, MediaLimit()).num_frames
            labels = [modality if len(each) == 1 else f"{modality} {number}" for number in range(len(each))]
            if modality == IMAGE:
                self._check_heads(processors[modality], each, labels, left)
            for item, label, uuid in zip(each, labels, names, strict=True):
                with _told(label):
                    room = Room(self._max_tokens, left, frames)
                    found.append(self._prepared(processors[modality], modality, item, label, uuid, room))
                left -= found[-1].num_tokens
        return found

    def _prepared(
        self, processor: Processor, modality: str, given: Any, label: str, uuid: str | None, room: Room
    ) -> Media:
        """One item, from the cache where it is there and there is room for it."""
        content = None if self.cache is None else uuid or content_key(given)
        time = time_key(given) if uuid is not None else None
        key = None if content is None else (modality, processor, uuid is not None, content, time)
        if self.cache is not None and key is not None:
            found = self.cache.get(key)
            if found is not None and found.fits(room):
                return found
        if given is None:
            raise ValidationError(
                f"{label}: Cache miss for {modality} but data is not provided: None stands for what an earlier prompt "
                "gave under the same name in multi_modal_uuids, while it is kept (mm_processor_cache_gb). Give it."
            )
        made = getattr(processor, modality)(given, name=label, uuid=uuid, room=room)
        if self.cache is not None and key is not None:
            self.cache.put(key, made)
        return made

    def _check_count(self, modality: str, count: int) -> None:
        limit = self._limits.get(modality, MediaLimit()).count
        if modality not in self._tokens and limit:
            known = ", ".join(self._tokens)
            raise ValidationError(f"multi_modal_data has {modality!r}, which the model does not take; it takes {known}")
        if count > limit:
            raise ValidationError(
                f"At most {limit} {modality}(s) may be provided in one prompt, and this one has {count}. "
                f"limit_mm_per_prompt={{{modality!r}: {count}}} allows them."
            )

    def _check_heads(self, processor: Processor, each: Sequence[Any], labels: Sequence[str], left: int) -> None:
        """Before the first picture of a prompt is decoded, as far as files tell their size."""
        pixels = 0
        for item, label in zip(each, labels, strict=True):
            if (size := size_of_file(item)) is None:
                continue
            left -= self._least_tokens(processor, size, label, left)
            pixels += size[0] * size[1]
            if pixels > MOST_DECODED:
                raise ValidationError(
                    f"The images up to {label} have {pixels} pixels, and at most {MOST_DECODED} of a prompt are "
                    "decoded. Make them smaller first."
                )

    def _least_tokens(self, processor: Processor, size: tuple[int, int], label: str, left: int) -> int:
        """Vectors of a picture that may have to be turned, which a head does not always tell.

        Raises:
            ValidationError: there is no room for it, turned or not.
        """
        counts: list[int] = []
        refused: ValidationError | None = None
        for form in (size, (size[1], size[0])):
            try:
                processor.check_room(form, 1, label, Room(self._max_tokens, left))
                counts.append(processor.tokens_of(*form))
            except ValidationError as error:
                refused = refused or error
        if refused is not None and not counts:
            raise refused
        return min(counts)

    def _check_frames(self, count: int, label: str) -> None:
        """Before frames are fetched; two of them are one vector at least."""
        limit = self._limits.get(VIDEO, MediaLimit()).num_frames
        video: Any = self._processors[VIDEO]
        most = self._max_model_len * video.temporal_patch_size
        most = most if limit is None else min(most, limit)
        if count > most:
            raise ValidationError(
                f"{label} has {count} frames, and at most {most} are taken: num_frames of limit_mm_per_prompt, and the "
                "maximum model length, bound them. Give fewer."
            )

    def check_no_places(self, token_ids: list[int]) -> None:
        """Raise ValidationError for a prompt that has places, and nothing to put there."""
        token_ids = self._marks.in_tokens(token_ids, self._tokenizer)
        for modality, token in self._tokens.items():
            if token in token_ids:
                raise self._other_places(modality, 0, token_ids.count(token))

    def _other_places(self, modality: str, number: int, places: int) -> ValidationError:
        return ValidationError(
            f"Expected there to be {number} prompt placeholders corresponding to {number} {modality} items, but "
            f"instead found {places} prompt placeholders! The prompt needs one {modality} token "
            f"(id {self._tokens[modality]}) for each."
        )

    def place(self, token_ids: list[int], given: Sequence[Media]) -> tuple[list[int], PromptMedia]:
        """Put pictures and videos into the places that a prompt has for them: one token each, or as many as it has
        vectors.

        Returns:
            (token_ids, media): the tokens with one for each vector.

        Raises:
            ValidationError: the prompt has another number of places.
        """
        token_ids = self._marks.in_tokens(token_ids, self._tokenizer)
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
            if left or counts[modality] > number:
                raise self._other_places(modality, number, counts[modality])
        items = tuple(_items(placed))
        if not self._has_axes:
            return found, PromptMedia(items)
        offsets, delta = rope_offsets(placed, len(found), self._processors[given[0].modality].merge_size)
        return found, PromptMedia(items, offsets, delta)


@contextlib.contextmanager
def _told(label: str) -> Iterator[None]:
    """Whatever reading what strangers send stumbles over ends their prompt, and no other."""
    try:
        yield
    except ValidationError:
        raise
    except Exception as error:
        raise ValidationError(f"{label} cannot be read: {type(error).__name__}: {error!s:.200}") from error


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
    return given is not None and not isinstance(given, list | tuple | str | bytes)


def _uuids(given: Any, modality: str, count: int, salt: str | None) -> list[str | None]:
    """Names of contents. Prompts of one salt share them, as they share blocks: no other can put a content in place of
    theirs.
    """
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
    if salt is None:
        return [uuid and f"uuid {uuid}" for uuid in each]
    return [uuid and f"salted uuid {(salt, uuid)!r}" for uuid in each]
