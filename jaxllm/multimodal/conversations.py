"""Conversations with pictures: what their parts say is taken out, and marks of it stay for the chat template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.multimodal.access import MediaAccess
from jaxllm.multimodal.items import IMAGE, VIDEO

#: of all that one conversation has read for it
MOST_BYTES = 2**30
#: a part's type -> its modality
_KINDS = {
    **dict.fromkeys(("image_url", "input_image", "image", "image_pil"), IMAGE),
    **dict.fromkeys(("video", "video_url"), VIDEO),
}


def has_media(messages: Any) -> bool:
    """Whether any part of a conversation is no text."""
    return any(_is_media(part) for message in _listed(messages) for part in _parts(message))


def without_media(
    prompt: Mapping[str, Any],
    access: MediaAccess,
    placeholders: Mapping[str, str],
    check_count: Callable[[str, int], None],
    check_frames: Callable[[int, str], None],
) -> dict[str, Any]:
    """A prompt with `messages` whose parts have become `multi_modal_data` and `multi_modal_uuids`: {"type": "image"}
    stands in the place of each, or, where the chat template takes texts, `placeholders` in front of the message's text.

    A part without a picture of its own stands for the next one of the prompt's own `multi_modal_data`, or for the one
    that was given under its `uuid` before.

    Args:
        check_count: raises for too many of a modality, before the first is read.
        check_frames: raises for too many frames of one video, before the first is read, with a name of it.

    Raises:
        ValidationError: a part is none, or may not be read; the text names the message.
    """
    parts = (part for message in prompt["messages"] for part in _parts(message))
    for modality, count in Counter(_KINDS[part["type"]] for part in parts if _is_media(part)).items():
        check_count(modality, count)
    own = {modality: _as_list(given, modality) for modality, given in (prompt.get("multi_modal_data") or {}).items()}
    names = {modality: _as_list(given) for modality, given in (prompt.get("multi_modal_uuids") or {}).items()}
    data: dict[str, list[Any]] = {}
    held = 0

    def read(place: str, label: str) -> bytes:
        nonlocal held
        found = access.read(place, label)
        held += len(found)
        if held > MOST_BYTES:
            raise ValidationError(f"{label}: the media up to it have more than {MOST_BYTES} bytes. Make them smaller.")
        return found

    uuids: dict[str, list[Any]] = {}

    def mark(index: int, part: Any) -> Any:
        if not _is_media(part):
            return part
        modality = _KINDS[part["type"]]
        label = f"message {index}, {part['type']}"
        given, uuid = _content(part, read, label, check_frames), part.get("uuid")
        if given is None:
            if own.get(modality):
                given = own[modality].pop(0)
                uuid = names[modality].pop(0) if names.get(modality) else uuid
            elif uuid is None:
                raise ValidationError(f"{label} has nothing of its own, and multi_modal_data has none left for it")
        data.setdefault(modality, []).append(given)
        uuids.setdefault(modality, []).append(uuid)
        return {"type": modality}

    messages = []
    for index, message in enumerate(prompt["messages"]):
        content = [mark(index, part) for part in _parts(message)]
        if not any(_is_media(part) for part in content):
            messages.append(message)
            continue
        if prompt.get("chat_template_content_format") == "string":
            marks = [placeholders[part["type"]] for part in content if _is_media(part)]
            content = [*marks, *(part for part in content if not _is_media(part))]
        messages.append({**message, "content": content})
    left = next((modality for modality, items in own.items() if items), None)
    if left is not None:
        raise ValidationError(f"multi_modal_data has {left}s that no part of the messages stands for")
    return {**prompt, "messages": messages, "multi_modal_data": data, "multi_modal_uuids": uuids}


def _content(
    part: Mapping[str, Any],
    read: Callable[[str, str], bytes],
    label: str,
    check_frames: Callable[[int, str], None],
) -> Any:
    """What a part holds; None: it stands for something else."""
    given = part.get(part["type"], part.get("image_url", part.get("url")))
    if isinstance(given, Mapping):
        given = given.get("url")
    if given is None and part.get("uuid") is None and part["type"] in ("image_url", "input_image"):
        raise ValidationError(f"{label} must have a URL: {{'url': 'data:image/png;base64,...'}}, got {part!r:.80}")
    if _KINDS[part["type"]] == VIDEO:
        if isinstance(given, str):
            return read(given, label)
        if not isinstance(given, list):
            return given
        check_frames(len(given), label)
        _check_flat(given, label)
        # frames are pictures, and read from where pictures may be
        return [read(frame, label) if isinstance(frame, str) else frame for frame in given]
    _check_flat([given], label)
    return read(given, label) if isinstance(given, str) else given


def _check_flat(pictures: Sequence[Any], label: str) -> None:
    """Raise ValidationError for a list in a picture's place: what it names would not be asked of `MediaAccess`."""
    for given in pictures:
        if isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray | memoryview):
            raise ValidationError(
                f"{label}: a picture must be one URL, got {type(given).__name__}: {given!r:.80}. Several pictures are "
                "several parts, and the frames of a video are one flat list."
            )


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()


def _parts(message: Any) -> Sequence[Any]:
    return _listed(message.get("content")) if isinstance(message, Mapping) else ()


def _is_media(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("type"), str) and part["type"] in _KINDS


def _as_list(given: Any, modality: str = IMAGE) -> list[Any]:
    if modality == VIDEO:  # a list may be the frames of one
        return [given]
    return list(given) if isinstance(given, list | tuple) else [given]
