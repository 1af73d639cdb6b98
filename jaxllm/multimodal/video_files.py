"""Files of videos: frames that are spread evenly over the time, as many a second as are asked for.

Which frames are taken is transformers' rule (`Qwen2VLVideoProcessor.sample_frames`).
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.extras import how_to_install
from jaxllm.multimodal.pictures import MOST_DECODED

#: frames of a video at least, as far as it has them, and at most
LEAST_FRAMES, MOST_FRAMES = 4, 768
#: FFmpeg's names of what files are read as: others (playlists) name further files, and places on the network
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,flv,ogg"


def pyav() -> Any:
    """PyAV's module. Raises ValidationError where it is not installed."""
    try:
        import av  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValidationError(
            f"files of videos need PyAV, which cannot be imported ({error}): {how_to_install('video')}. Lists of "
            "frames need none."
        ) from None
    return av


@dataclasses.dataclass(frozen=True)
class VideoFile:
    """The frames that are taken of a file: as many as `len` says, decoded one at a time while they are gone through."""

    name: str
    data: bytes
    #: number in the file of each, ascending
    places: tuple[int, ...]
    #: of what is taken, in a second
    fps: float

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Any]:
        """Pictures of Pillow's."""
        wanted, found = iter(self.places), 0
        place = next(wanted)
        try:
            with _opened(self.data) as container:
                for number, frame in enumerate(container.decode(video=0)):
                    while number == place:
                        yield frame.to_image()
                        found += 1
                        place = next(wanted, -1)
                    if place < 0:
                        return
        except Exception as error:
            raise ValidationError(f"{self.name} is broken behind frame {found} of those taken: {error}") from None
        raise ValidationError(f"{self.name} ends behind {found} of the {len(self)} frames that its head promises")


def open_video(
    given: bytes | str | os.PathLike[str], name: str, *, fps: float, together: int, most_frames: int | None = None
) -> VideoFile:
    """A file's frames.

    Args:
        given: its bytes or its path.
        name: for errors.
        fps: frames to take in a second.
        together: what their number is a multiple of.
        most_frames: no more are taken; None: `MOST_FRAMES`.

    Raises:
        ValidationError: it is no video that can be read, or too much of one.
    """
    pyav()
    if isinstance(given, str | os.PathLike):
        try:
            given = Path(given).expanduser().read_bytes()
        except (OSError, ValueError) as error:
            raise ValidationError(f"{name}: {str(given)!r:.200} cannot be read: {error}") from None
    data = bytes(given)
    try:
        with _opened(data) as container:
            if not container.streams.video:
                raise ValidationError(f"{name}: the file has sound alone, and no video")
            stream = container.streams.video[0]
            width, height, rate = stream.width, stream.height, stream.average_rate
            # not all heads tell how many there are
            total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    except ValidationError:
        raise
    # decoders raise whatever a broken file makes them stumble over
    except Exception as error:
        raise ValidationError(f"{name}: {len(data)} bytes are no video that PyAV can read: {error}") from None
    if not total or not rate or not width or not height:
        raise ValidationError(f"{name}: the file has a video without frames")
    if total * width * height > MOST_DECODED:
        raise ValidationError(
            f"{name} has {total} frames of {width} x {height} pixels, and at most {MOST_DECODED} are decoded. Make it "
            "shorter or smaller first."
        )
    most = min(MOST_FRAMES if most_frames is None else most_frames, total)
    count = min(max(total / float(rate) * fps, LEAST_FRAMES), most // together * together)
    count = int(count / together) * together or min(most, 1)
    places = tuple(int(number * (total / count)) for number in range(count))
    return VideoFile(name, data, places, count * float(rate) / total)


def _opened(data: bytes) -> Any:
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
    return pyav().open(io.BytesIO(data), mode="r", metadata_errors="ignore", options=options)
