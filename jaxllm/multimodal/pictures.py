"""Pictures as callers give them become arrays of pixels, or an error that says what is wrong with them."""

from __future__ import annotations

import io
import os
import re
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError

#: more pixels than any camera's picture has: what a few bytes unfold to would take gigabytes
MOST_PIXELS = 2**27
#: pixels of a prompt's images, or of a video, that are decoded at most: about three minutes of a core
MOST_DECODED = 2**34
#: what files are read as: Pillow would start other programs for some formats, and has old decoders for others
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
#: what is seen through a picture, as in vLLM
_GROUND = (255, 255, 255)
#: numbers of a pixel that arrays may have, as Pillow calls such pictures
_ARRAY_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
#: more than there are threads that read pictures, so that these seldom wait for each other
_LOCKS = tuple(threading.Lock() for _ in range(64))


def pillow() -> Any:
    """Pillow's Image module. Raises ValidationError where it is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ValidationError(f"images need Pillow, which cannot be imported ({error}): pip install pillow") from None
    return Image


def lock_of(picture: Any) -> threading.Lock:
    """Held while a picture of Pillow's is decoded, which its file may be opened for and several prompts may have."""
    return _LOCKS[id(picture) // 16 % len(_LOCKS)]


def read_picture(given: Any, name: str) -> Any:
    """A picture as Pillow has it, in RGB, upright, its first frame.

    Args:
        given: a picture of Pillow's, an array [height, width, 1, 3 or 4] or [height, width] of bytes or of floats from
            0 to 1, a path, or a file's bytes.
        name: of the picture, for errors.

    Raises:
        ValidationError: it is none, is broken, has no pixels, or too many.
    """
    image_module = pillow()
    if isinstance(given, image_module.Image):
        return _upright(given, name)
    if isinstance(given, str) and re.match(r"(data|https?|file):", given):
        raise ValidationError(
            f"{name}: {given!r:.40} is a URL. Those are read in messages only: LLM.chat([{{'role': 'user', 'content': "
            "[{'type': 'image_url', 'image_url': {'url': ...}}]}]). Give a path or the file's bytes."
        )
    if isinstance(given, str | os.PathLike):
        path = Path(given).expanduser()
        try:
            given = path.read_bytes()
        except (OSError, ValueError) as error:
            raise ValidationError(f"{name}: {str(given)!r:.200} cannot be read: {error}") from None
    if isinstance(given, bytes | bytearray | memoryview):
        return _decoded(bytes(given), name)
    return _upright(_of_array(given, name), name)


def convert_image_mode(image: Any, to_mode: str) -> Any:
    """A picture of Pillow's in another mode, for scripts of vLLM's; in RGB, what is seen through it stands on white."""
    return read_picture(image, "image") if to_mode == "RGB" else image.convert(to_mode)


def size_of_file(given: Any) -> tuple[int, int] | None:
    """(width, height) that the head of a file's bytes tells, not turned; None: they are something else, or broken."""
    if not isinstance(given, bytes | bytearray | memoryview):
        return None
    try:
        width, height = _opened(bytes(given)).size
    except Exception:  # reading it tells why
        return None
    return (width, height) if width and height else None


def _opened(data: bytes) -> Any:
    """A picture that is not decoded so far."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own bound on pixels is checked elsewhere
        return pillow().open(io.BytesIO(data), formats=FORMATS)


def _decoded(data: bytes, name: str) -> Any:
    try:
        picture = _opened(data)
        _check_size(picture, name)
        picture.load()
    except ValidationError:
        raise
    # decoders raise whatever a broken file makes them stumble over
    except Exception as error:
        raise ValidationError(
            f"{name}: {len(data)} bytes are no picture that Pillow can read as {', '.join(FORMATS)}{_reason(error)}"
        ) from None
    return _upright(picture, name)


def _reason(error: Exception) -> str:
    """What a decoder says, without the names that objects have in memory."""
    said = re.sub(r"\s*<[^<>]* at 0x[0-9a-f]+>", "", str(error))
    return f": {said}" if said else ""


def _check_size(picture: Any, name: str) -> None:
    width, height = picture.size
    if not width or not height:
        raise ValidationError(f"{name} has no pixels: it is {width} x {height}.")
    if width * height > MOST_PIXELS:
        raise ValidationError(
            f"{name} has {width} x {height} pixels, and at most {MOST_PIXELS} are read. Make it smaller first."
        )


def _upright(picture: Any, name: str) -> Any:
    from PIL import ImageOps

    _check_size(picture, name)
    try:
        with lock_of(picture):
            picture.seek(0)
            picture.load()
            picture.getexif()  # kept by the picture, and read by what turns it
        if picture.mode.startswith("I;16") or picture.mode == "I":
            # 16 bits of a pixel: Pillow would cut off what is above 255
            numbers = np.asarray(picture).astype(np.int64)
            if picture.mode != "I" or numbers.max() > 255:
                numbers >>= 8
            picture = pillow().fromarray(np.clip(numbers, 0, 255).astype(np.uint8))
        if picture.mode == "F":
            # floats are read as those of arrays are, where they are such; Pillow would make them black
            numbers = np.asarray(picture)
            if 0 <= numbers.min() and numbers.max() <= 1:
                picture = pillow().fromarray(np.round(numbers * 255).astype(np.uint8))
        turned = ImageOps.exif_transpose(picture)
        if turned.mode == "RGB" and "transparency" not in turned.info:
            return turned
        if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
            turned = turned.convert("RGBA")
            ground = pillow().new("RGB", turned.size, _GROUND)
            ground.paste(turned, mask=turned.getchannel("A"))
            return ground
        return turned.convert("RGB")
    except Exception as error:
        raise ValidationError(f"{name} cannot be decoded{_reason(error)}") from None


def _of_array(given: Any, name: str) -> Any:
    try:
        array = np.asarray(given.detach().cpu().numpy() if hasattr(given, "detach") else given)
    except (TypeError, ValueError) as error:
        raise ValidationError(_no_picture(given, name)) from error
    if array.ndim == 2:
        array = array[:, :, None]
    if array.dtype.kind not in "uif" or array.ndim != 3:
        raise ValidationError(_no_picture(given, name))
    if array.shape[-1] not in _ARRAY_MODES and array.shape[0] in _ARRAY_MODES:
        array = np.moveaxis(array, 0, -1)  # as torch has them
    if array.shape[-1] not in _ARRAY_MODES or not array.size:
        raise ValidationError(f"{name}: an array of a picture is [height, width, 3], got shape {array.shape}")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ValidationError(f"{name}: an array of floats must have numbers from 0 to 1")
        array = np.round(array * 255)
    if array.min() < 0 or array.max() > 255:
        raise ValidationError(f"{name}: an array of integers must have numbers from 0 to 255")
    array = np.ascontiguousarray(array.astype(np.uint8))
    return pillow().fromarray(array[:, :, 0] if array.shape[-1] == 1 else array)


def _no_picture(given: Any, name: str) -> str:
    return (
        f"{name} must be a picture of Pillow's, an array [height, width, 3], a path or a file's bytes, got "
        f"{type(given).__name__}: {given!r:.80}"
    )
