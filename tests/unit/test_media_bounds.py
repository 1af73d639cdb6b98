"""What strangers send is counted and bounded before it is read, decoded or unfolded."""

from __future__ import annotations

import base64
import json
import os
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.local_host import Handler, local_host
from support.pictures import PROCESSOR, encoded, reader
from support.seeing_models import picture

from jaxllm.api.errors import ValidationError
from jaxllm.multimodal.access import MediaAccess
from jaxllm.multimodal.processor_cache import content_key
from jaxllm.multimodal.qwen_processor import QwenProcessor

Image = pytest.importorskip("PIL.Image")


class Counted(list):
    """A list that knows how many of its items were looked at."""

    seen = 0

    def __getitem__(self, index: Any) -> Any:
        self.seen += 1
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self.seen += 1
            yield item


def test_sizes_are_checked_before_pixels_are_made(monkeypatch: pytest.MonkeyPatch):
    """A dot that options would unfold to gigabytes, and numbers that no float holds."""
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **__: pytest.fail("was resized"))
    dot = {"multi_modal_data": {"image": picture(1, 1)}}
    for pixels, why in (
        (10**10, "at most 134217728"),
        (10**400, "at most 134217728"),
        (2**27, "has planned for 64 an item"),
        (28 * 28 * 65, "has planned for 64 an item"),
    ):
        options = {"min_pixels": pixels, "max_pixels": pixels}
        for given in (dot, {"multi_modal_data": {"video": [picture(1, 1)]}}):
            with pytest.raises(ValidationError, match=why):
                reader().read({**given, "mm_processor_kwargs": options})
        with pytest.raises(ValidationError, match=why):
            reader().read({**dot, "mm_processor_kwargs": {"size": {"shortest_edge": pixels, "longest_edge": pixels}}})


def test_videos_are_read_a_frame_at_a_time_and_no_further_than_they_fit(monkeypatch: pytest.MonkeyPatch):
    held: list[int] = []
    resized = QwenProcessor._resized

    def counting(self: QwenProcessor, image: Any) -> np.ndarray:
        held.append(film.seen)
        return resized(self, image)

    monkeypatch.setattr(QwenProcessor, "_resized", counting)
    film = Counted(encoded(picture(56, 56, seed=seed), "PNG") for seed in range(5))
    media = PROCESSOR.video(film)
    assert [item.num_tokens for item in media.items] == [4] * 3 and held == [1, 2, 3, 4, 5]
    # 4 vectors for every two frames, of 50 frames
    long = Counted([encoded(picture(56, 56), "PNG")] + [b"nothing that could be read"] * 49)
    with pytest.raises(ValidationError, match="becomes 100 tokens, and 99 are left"):
        reader(99).read({"multi_modal_data": {"video": (long, {"fps": 2})}})
    assert long.seen == 1
    limited = reader(video={"num_frames": 4})
    assert len(limited.read({"multi_modal_data": {"video": [film[:4]]}})[0].items) == 2
    with pytest.raises(ValidationError, match="5 frames, and num_frames of limit_mm_per_prompt allows 4"):
        limited.read({"multi_modal_data": {"video": [list(film)]}})
    with pytest.raises(ValidationError, match="its time at most"):
        reader().read({"multi_modal_data": {"video": [list(film)]}, "mm_processor_kwargs": {"fps": 1e-9}})


def test_items_together_are_no_longer_than_the_context():
    """Where they do not fit, none is decoded."""
    given = [b"nothing that could be read", *[encoded(picture(112, 112), "PNG")] * 3, picture(112, 112)]
    with pytest.raises(ValidationError, match="image 3 becomes 16 tokens, and 8 are left for it"):
        reader(40).read({"multi_modal_data": {"image": given}})
    with pytest.raises(ValidationError, match="image 2 becomes 16 tokens, and 8 are left for it"):
        reader(40).read({"multi_modal_data": {"image": [picture(112, 112)] * 3}})
    with pytest.raises(ValidationError, match="image 0: 26 bytes are no picture"):
        reader(50).read({"multi_modal_data": {"image": given[:4]}})


def test_what_is_decoded_for_a_prompt_is_bounded(monkeypatch: pytest.MonkeyPatch):
    """Though options make few vectors of it."""
    monkeypatch.setattr("jaxllm.multimodal.pictures._upright", lambda *_: pytest.fail("was decoded"))
    data = encoded(Image.new("1", (8192, 8192)), "PNG")
    few = {"mm_processor_kwargs": {"min_pixels": 784, "max_pixels": 784}}
    with pytest.raises(ValidationError, match="The images up to image 256 have"):
        reader().read({"multi_modal_data": {"image": [data] * 300}, **few})
    monkeypatch.undo()
    monkeypatch.setattr(QwenProcessor, "_resized", lambda *_: pytest.fail("was resized"))
    with pytest.raises(ValidationError, match="300 frames of 8192 x 8192 pixels"):
        reader().read({"multi_modal_data": {"video": [[data] * 300]}, **few})


def asked(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, *parts]}]}


def image_url(url: str, **others: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **others}


@pytest.fixture
def host() -> Iterator[tuple[str, list[str]]]:
    """A web host of this machine, and what was asked of it."""
    paths: list[str] = []

    def answer(asked: Handler) -> None:
        paths.append(asked.path)
        drops = 100 if asked.path.startswith("/drops") else 0
        data = encoded(picture(28, 28), "PNG")
        asked.send_response(200)
        for drop in range(drops * (asked.path == "/drops-of-head")):
            asked.send_header(f"X-{drop}", "x")
            asked.flush_headers()
            time.sleep(0.02)
        asked.send_header("Content-Length", str(len(data) + 100 * (asked.path == "/short")))
        asked.end_headers()
        for byte in range(drops):
            asked.wfile.write(data[byte : byte + 1])
            time.sleep(0.02)
        asked.wfile.write(data[drops:])

    with local_host(answer) as url:
        yield url, paths


def test_parts_are_counted_before_the_first_is_read(host: tuple[str, list[str]]):
    url, paths = host
    few = reader(image=2, video={"num_frames": 3})
    with pytest.raises(ValidationError, match=r"At most 2 image\(s\)"):
        few.of_conversation(asked(*[image_url(f"{url}/one")] * 3))
    with pytest.raises(ValidationError, match="4 frames, and at most 3 are taken"):
        few.of_conversation(asked({"type": "video", "video": [f"{url}/one"] * 4}))
    with pytest.raises(ValidationError, match="21 frames, and at most 20 are taken"):
        reader(10).of_conversation(asked({"type": "video", "video": [f"{url}/one"] * 21}))
    assert not paths
    read = few.of_conversation(asked(*[image_url(f"{url}/one")] * 2))
    assert len(few.read(read)) == 2 and paths == ["/one"] * 2


def test_what_is_read_for_a_conversation_is_bounded(host: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch):
    url, paths = host
    size = len(encoded(picture(28, 28), "PNG"))
    monkeypatch.setattr("jaxllm.multimodal.conversations.MOST_BYTES", 2 * size)
    film = {"type": "video", "video": [f"{url}/one"] * 4}
    for parts in ([image_url(f"{url}/one")] * 4, [film]):
        paths.clear()
        with pytest.raises(ValidationError, match=f"have more than {2 * size} bytes"):
            reader().of_conversation(asked(*parts))
        assert len(paths) == 3


def test_what_http_stumbles_over_is_a_prompts_own_error(host: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch):
    url, _ = host
    for place in (f"{url}/a b", "http://127.0.0.1:abc/x", f"{url}/short", "http://127.0.0.1:1/x"):
        with pytest.raises(ValidationError, match="cannot be fetched"):
            reader().of_conversation(asked(image_url(place)))
    with pytest.raises(ValidationError, match="multi_modal_data must be a dict"):
        reader().of_conversation({**asked(image_url(f"{url}/one")), "multi_modal_data": ["none"]})
    # each drop is there in time, and all of them are not
    monkeypatch.setattr("jaxllm.multimodal.access.SECONDS", 0.3)
    for path in ("drops", "drops-of-head"):
        with pytest.raises(ValidationError, match=r"cannot be fetched: .*(seconds|timed out)"):
            reader().of_conversation(asked(image_url(f"{url}/{path}")))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": ["{}"]}},
        {"type": "image", "image": ["{}"]},
        {"type": "video", "video": [["{}"]]},
        {"type": "video_url", "video_url": {"url": [[["{}"]]]}},
    ],
    ids=lambda part: part["type"],
)
def test_lists_in_the_place_of_pictures_open_nothing(
    part: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "secret.png").write_bytes(encoded(picture(28, 28), "PNG"))
    part = json.loads(json.dumps(part).replace("{}", str(tmp_path / "secret.png")))
    opened: list[Path] = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) or b"")
    with pytest.raises(ValidationError, match="a picture must be one URL, got list"):
        reader().of_conversation(asked(part))
    given = part.get("image", part.get("video", [str(tmp_path / "secret.png")]))
    assert content_key(given) is None and not opened


def test_pipes_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("was opened"))
    with pytest.raises(ValidationError, match="there is no such file"):
        MediaAccess(str(tmp_path)).read(str(tmp_path / "pipe"), "image")


def test_data_is_not_kept_once_it_is_read():
    """Though texts that are split as URLs are."""
    data = base64.b64encode(encoded(picture(28, 28), "PNG")).decode()
    before = urllib.parse.urlsplit.cache_info()  # pyright: ignore[reportFunctionMemberAccess]
    for place in (f"data:image/png;base64,{data}", f" DATA:image/png;base64,{data}"):
        assert MediaAccess().read(place, "image") == base64.b64decode(data)
    with pytest.raises(ValidationError, match="is no URL: it has 100009 characters"):
        MediaAccess().read("https:///" + "a" * 100_000, "image")
    assert urllib.parse.urlsplit.cache_info() == before  # pyright: ignore[reportFunctionMemberAccess]
