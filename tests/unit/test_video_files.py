"""Files of videos give the frames that transformers would take of them, and nothing else is read."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pictures import PROCESSOR, reader

from jaxllm.api.errors import ValidationError
from jaxllm.multimodal.processor_cache import ProcessorCache
from jaxllm.multimodal.video_files import open_video

av = pytest.importorskip("av")
pytest.importorskip("PIL")


def video(frames: int, rate: int = 8, form: str = "mp4", codec: str = "mpeg4") -> bytes:
    """Of squares whose grey is five times their number."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=form) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width = stream.height = 56
        stream.bit_rate = 10**7
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            grey = np.full((56, 56, 3), 40 + 5 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("frames", "rate", "fps"), [(33, 8, 2.0), (33, 8, 30.0), (5, 8, 0.1), (3, 8, 2.0), (1, 8, 2.0)]
)
@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_frames_are_those_that_transformers_takes(frames: int, rate: int, fps: float, form: str):
    found = open_video(video(frames, rate, form), "it", fps=fps, together=2)
    count = min(max(frames / rate * fps, 4), frames // 2 * 2) // 2 * 2 or 1
    expected = np.arange(0, frames, frames / count).astype(int)
    assert len(found) == len(expected) and found.fps == pytest.approx(count * rate / frames)
    greys = [np.asarray(picture).mean() for picture in found]
    np.testing.assert_allclose(greys, 40 + 5 * expected, atol=2.4)


def test_a_file_is_a_video_of_a_prompt(tmp_path: Path):
    path = tmp_path / "film.mp4"
    path.write_bytes(video(33))
    own = reader()
    forms: list[Any] = [str(path), path, path.read_bytes(), [str(path)]]
    found = [own.read({"multi_modal_data": {"video": form}})[0] for form in forms]
    # 8 frames, of which two are an item
    assert [len(media.items) for media in found] == [4] * 4
    hashes = {tuple(item.content_hash for item in media.items) for media in found}
    assert len(hashes) == 1
    # 2 of 8 frames in a second, two positions in a second
    assert found[0].time_step == pytest.approx(2 * 2 / (8 * 8 / 33))
    limited = reader(video={"num_frames": 4})
    assert len(limited.read({"multi_modal_data": {"video": path}})[0].items) == 2
    data = base64.b64encode(path.read_bytes()).decode()
    part = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
    prompt = own.of_conversation({"messages": [{"role": "user", "content": [part]}]})
    assert [item.content_hash for item in own.read(prompt)[0].items] == list(hashes.pop())


def test_a_uuid_names_other_frames_where_others_are_taken():
    own, data = reader(), video(33)
    own.cache = ProcessorCache(2**24)
    named: dict[str, Any] = {"multi_modal_uuids": {"video": "own"}}

    def names(given: Any, **options: Any) -> list[str]:
        found = own.read({"multi_modal_data": {"video": given}, **named, "mm_processor_kwargs": options})[0]
        return [item.content_hash for item in found.items]

    slow, fast = names(data), names(data, fps=4.0)
    assert len(slow) == 4 and len(fast) == 8 and not set(slow) & set(fast)
    assert names((data, {"fps": 4.0})) == fast and names((data, {"fps": 2.0})) == slow == names(data)


def test_what_is_no_video_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = tmp_path / "other.mp4"
    other.write_bytes(video(9))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:{other}\n#EXT-X-ENDLIST\n".encode()
    several = f"ffconcat version 1.0\nfile {other}\n".encode()
    wrong = {
        "are no video": [b"text", b"", playlist, several, video(9)[:40]],
        "cannot be read": [tmp_path / "none.mp4"],
    }
    for why, all_of_them in wrong.items():
        for given in all_of_them:
            with pytest.raises(ValidationError, match=why):
                PROCESSOR.video(given)
    monkeypatch.setattr("jaxllm.multimodal.video_files.MOST_DECODED", 30 * 56 * 56)
    with pytest.raises(ValidationError, match="40 frames of 56 x 56 pixels, and at most"):
        PROCESSOR.video(video(40))


def test_broken_files_are_refused_and_nothing_else_happens():
    data, random, refused = video(9), np.random.default_rng(0), 0
    for _ in range(60):
        broken = bytearray(data)
        for place in random.integers(0, len(broken), 8):
            broken[place] = random.integers(256)
        try:
            assert PROCESSOR.video(bytes(broken)).items
        except ValidationError:
            refused += 1
    assert refused
