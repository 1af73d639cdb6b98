"""Pictures before the encoder: what is read of them, what transformers makes of them, where they stand in a prompt."""

from __future__ import annotations

import contextlib
import http.server
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.tiny_vl_model import IMAGE, VIDEO, VISION, picture

from jaxllm.api.errors import ValidationError
from jaxllm.config.media import MediaLimit, domains, media_limits
from jaxllm.engine.cache.encoder_cache import EncoderCache
from jaxllm.multimodal.access import MediaAccess
from jaxllm.multimodal.items import Grid, Media, MediaItem
from jaxllm.multimodal.pictures import read_picture
from jaxllm.multimodal.prompts import MediaReader
from jaxllm.multimodal.qwen_processor import QwenProcessor

Image = pytest.importorskip("PIL.Image")
PROCESSOR = QwenProcessor.of(VISION["qwen2_5_vl"], {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 64})


def reader(max_model_len: int = 1000, **limits: Any) -> MediaReader:
    return MediaReader(
        {"image": PROCESSOR, "video": PROCESSOR},
        {"image": IMAGE, "video": VIDEO},
        media_limits("limits", limits),
        max_tokens=64,
        max_model_len=max_model_len,
        access=MediaAccess(domains=["127.0.0.1"]),
    )


def normal(item: MediaItem) -> np.ndarray:
    """What the tower takes."""
    mean, deviation = (np.asarray(numbers)[:, None] for numbers in PROCESSOR.normal)
    return ((item.pixels.reshape(len(item.pixels), 3, -1) / 255 - mean) / deviation).reshape(item.pixels.shape)


def encoded(image: Any, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "size", [(100, 70), (70, 98), (33, 300), (500, 400), (28, 28), (3, 3), (14, 14), (1000, 30), (42, 70)]
)
def test_patches_are_those_of_transformers(size: tuple[int, int]):
    pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    theirs = module.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 64)
    given = picture(*size)
    expected = theirs(given, return_tensors="np")
    (item,) = PROCESSOR.image(given).items
    assert (1, *item.grid) == tuple(expected["image_grid_thw"][0])
    np.testing.assert_allclose(normal(item), expected["pixel_values"], atol=1e-6)


def test_frames_of_videos():
    """Two together, as transformers' `patchify` has them (there it needs torchvision); an odd one is repeated."""
    frames = [picture(56, 84, seed=seed) for seed in range(3)]
    media = PROCESSOR.video(frames)
    assert [item.grid for item in media.items] == [Grid(6, 4)] * 2
    # a second of 2 frames is 2 positions of time
    assert media.time_step == 2.0 and PROCESSOR.video((frames, {"fps": 4.0})).time_step == 1.0
    whole = np.stack([np.moveaxis(np.asarray(f), -1, 0) for f in [*frames, frames[-1]]]).astype(np.float64) / 255
    mean, deviation = (np.asarray(x)[:, None, None] for x in (PROCESSOR.mean, PROCESSOR.deviation))
    scaled = ((whole - mean) / deviation).reshape(1, 2, 2, 3, 3, 2, 14, 2, 2, 14)
    expected = scaled.transpose(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(2, 24, -1)
    for item, own in zip(media.items, expected, strict=True):
        np.testing.assert_allclose(normal(item), own, atol=1e-6)
    array = PROCESSOR.video(np.stack([np.asarray(frame) for frame in frames]))
    assert [item.content_hash for item in array.items] == [item.content_hash for item in media.items]
    for wrong in ([], "file.mp4", b"bytes", frames[0], [frames[0], picture(28, 28)], np.zeros((3, 4, 4))):
        with pytest.raises(ValidationError, match="video"):
            PROCESSOR.video(wrong)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1", "YCbCr", "F"])
def test_every_kind_of_picture_is_read(mode: str):
    grey = np.arange(40 * 30, dtype=np.uint16).reshape(30, 40)
    own = Image.fromarray(grey * 50) if mode == "I;16" else picture(40, 30).convert(mode)
    read = read_picture(own, "it")
    assert (read.mode, read.size) == ("RGB", (40, 30))
    if mode == "I;16":
        np.testing.assert_array_equal(np.asarray(read)[..., 0], grey * 50 >> 8)


def test_pictures_are_upright_and_of_animations_the_first_frame_is_seen():
    turned = picture(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_picture(encoded(turned, "JPEG", exif=exif), "it").size == (30, 40)
    first, second = (Image.new("RGB", (30, 30), colour) for colour in ("red", "blue"))
    moving = encoded(first, "GIF", save_all=True, append_images=[second])
    assert np.asarray(read_picture(moving, "it"))[0, 0].tolist() == [255, 0, 0]


def test_what_is_seen_through_a_picture_is_white():
    """In whatever way a file says it: of each, the left half is seen through, and the right one is as it was."""
    left, right = (slice(0, 20), slice(20, 40))
    seen = np.zeros((30, 40, 4), np.uint8)
    seen[:, right] = [200, 100, 50, 255]
    whole = Image.fromarray(seen)
    grey = whole.convert("LA")
    colours = Image.fromarray((seen[..., 3] // 255).astype(np.uint8), "P")
    colours.putpalette([0, 0, 0, 200, 100, 50])
    bits = Image.fromarray(seen[..., 3]).convert("1")
    dots = Image.fromarray(seen[..., :3])
    pictures = {
        "RGBA": whole, "array": seen, "PNG": encoded(whole, "PNG"), "WEBP": encoded(whole, "WEBP", lossless=True),
        "LA": grey, "P": encoded(colours, "PNG", transparency=0), "GIF": encoded(colours, "GIF", transparency=0),
        "RGB": encoded(dots, "PNG", transparency=(0, 0, 0)), "L": encoded(bits.convert("L"), "PNG", transparency=0),
        "1": encoded(bits, "PNG", transparency=0),
    }  # fmt: skip
    for name, given in pictures.items():
        read = np.asarray(read_picture(given, name))
        assert read[:, left].min() == 255, name
        expected = {"LA": [grey.getpixel((30, 0))[0]] * 3, "L": [255] * 3, "1": [255] * 3}.get(name, [200, 100, 50])
        assert (read[:, right] == expected).all(), name
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert np.asarray(read_picture(half, "half"))[0, 0].tolist() == [127] * 3


def test_integers_are_of_16_bits_where_they_need_them():
    small = np.arange(256, dtype=np.int32).reshape(16, 16)
    for given, expected in ((small, small), (small * 256 + 7, small)):
        np.testing.assert_array_equal(np.asarray(read_picture(Image.fromarray(given), "it"))[..., 0], expected)


def test_errors_name_no_places_in_memory():
    with pytest.raises(ValidationError, match="are no picture") as refusal:
        read_picture(b"text", "it")
    assert " at 0x" not in str(refusal.value)
    for url in ("data:image/png;base64,AAAA" * 100, "http://example.org/x.png"):
        with pytest.raises(ValidationError, match="is a URL. Those are read in messages only") as refusal:
            read_picture(url, "it")
        assert len(str(refusal.value)) < 400


def test_formats_that_start_other_programs_are_refused():
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    for data in (script, encoded(picture(20, 20), "ICO"), encoded(picture(20, 20), "TGA")):
        with pytest.raises(ValidationError, match="no picture that Pillow can read as PNG"):
            read_picture(data, "it")


def test_bombs_are_refused():
    png = bytearray(encoded(Image.new("1", (8, 8)), "PNG"))
    png[16:24] = (50000).to_bytes(4, "big") * 2
    with pytest.raises(ValidationError, match=r"50000 x 50000 pixels|no picture"):
        read_picture(bytes(png), "it")


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_broken_files_are_refused_and_nothing_else_happens(form: str, count: int):
    """Each of many files with a few wrong bytes is read or refused."""
    data, random = encoded(picture(20, 20), form), np.random.default_rng(count)
    refused = 0
    for _ in range(count):
        broken = bytearray(data[: random.integers(1, len(data) + 1)])
        for place in random.integers(0, len(broken), 4):
            broken[place] = random.integers(256)
        try:
            assert read_picture(bytes(broken), "it").mode == "RGB"
        except ValidationError as error:
            assert str(error).startswith("it")
            refused += 1
    assert refused


@pytest.mark.parametrize("family", ["Qwen2_5_VL", "Qwen2VL"])
def test_positions_are_those_of_transformers(family: str):
    """Of pictures and videos in any order, at both ends and beside each other."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    vision = VISION["qwen2_5_vl" if family == "Qwen2_5_VL" else "qwen2_vl"]
    config = getattr(transformers, f"{family}Config")(
        text_config={"hidden_size": 16, "num_hidden_layers": 0, "num_attention_heads": 2, "vocab_size": 300,
                     "num_key_value_heads": 2, "intermediate_size": 8},
        vision_config={**vision, "depth": 0}, image_token_id=IMAGE, video_token_id=VIDEO,
    )  # fmt: skip
    theirs = getattr(transformers, f"{family}Model")(config)
    processor = QwenProcessor.of(vision, {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 64})
    own = MediaReader(
        {"image": processor, "video": processor},
        {"image": IMAGE, "video": VIDEO},
        {},
        max_tokens=64,
        max_model_len=1000,
        access=MediaAccess(),
    )
    small, wide = picture(56, 84), picture(200, 60)
    film = [picture(56, 56, seed=seed) for seed in range(9)]
    for text, images, videos in (
        ("abc@de", [small], []),
        ("@@", [small, wide], []),
        ("a#b@c", [wide], [(film, {"fps": 1.0})]),
        ("a#", [], [film]),
        ("@b#c#d", [small], [film[:2], (film, {"fps": 0.5})]),
    ):
        ids = [IMAGE if c == "@" else VIDEO if c == "#" else ord(c) for c in text]
        given = own.read({"multi_modal_data": {"image": images, "video": videos}})
        placed, media = own.place(ids, given)
        kinds = torch.tensor([[{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in placed]])
        grids = {
            kind: torch.tensor([[len(m.items), *m.items[0].grid] for m in given if m.modality == kind])
            for kind in ("image", "video")
        }
        seconds = [2 / (video[1]["fps"] if isinstance(video, tuple) else 2.0) for video in videos]
        more = {"second_per_grid_ts": torch.tensor(seconds)} if family == "Qwen2_5_VL" and seconds else {}
        if text.startswith("@@"):
            # two that touch are one run of tokens, which only a mark between them tells apart
            continue
        expected, delta = theirs.get_rope_index(
            torch.tensor([placed]), kinds, grids["image"] if images else None, grids["video"] if videos else None,
            **more,
        )  # fmt: skip
        np.testing.assert_array_equal(media.rope_offsets + np.arange(len(placed)), expected[:, 0].numpy())
        assert media.rope_delta == delta.item()


def test_placeholders_become_vectors():
    one, two = PROCESSOR.image(picture(56, 56)), PROCESSOR.image(picture(28, 56))
    ids, media = reader().place([1, IMAGE, 2, IMAGE, 3], [one, two])
    assert ids == [1, *[IMAGE] * 4, 2, *[IMAGE] * 2, 3]
    assert [(item.start, item.stop) for item in media.items] == [(1, 5), (6, 8)] and media.stop == 8
    again, _ = reader().place(ids, [one, two])
    assert again == ids
    film = PROCESSOR.video([picture(56, 56, seed=seed) for seed in range(4)])
    ids, media = reader().place([VIDEO], [film])
    assert ids == [VIDEO] * 8 and [(i.start, i.stop) for i in media.items] == [(0, 4), (4, 8)]
    assert len({item.key for item in media.items}) == 2
    for wrong in ([1], [IMAGE, 1, IMAGE, 1, IMAGE], [VIDEO]):
        with pytest.raises(ValidationError, match="prompt placeholders"):
            reader().place(wrong, [one, two])
    with pytest.raises(ValidationError, match="to be 0 prompt placeholders corresponding to 0 video items"):
        reader().place([IMAGE, VIDEO], [one])
    with pytest.raises(ValidationError, match="instead found 2 prompt placeholders"):
        reader().check_no_places([1, IMAGE, IMAGE])
    reader().check_no_places([1, 2])


def test_counts_are_limited_as_in_vllm():
    given = picture(28, 28)
    with pytest.raises(ValidationError, match=r"At most 1 image\(s\) may be provided in one prompt"):
        reader(image=1).read({"multi_modal_data": {"image": [given, given]}})
    with pytest.raises(ValidationError, match=r"At most 0 video\(s\) may be provided in one prompt"):
        reader(video=0).read({"multi_modal_data": {"video": [[given, given]]}})
    off = MediaReader(
        {"image": PROCESSOR}, {"image": IMAGE}, media_limits("limits", {"video": 0}), max_tokens=64, max_model_len=64,
        access=MediaAccess(),
    )  # fmt: skip
    with pytest.raises(ValidationError, match=r"At most 0 video\(s\) may be provided in one prompt"):
        off.read({"multi_modal_data": {"video": [[given, given]]}})
    film, array = [given, given], np.zeros((2, 28, 28, 3), np.uint8)
    forms = [film, array, [film], [array, array], [film, (film, {"fps": 3})], array[None]]
    counts = [len(reader().read({"multi_modal_data": {"video": form}})) for form in forms]
    assert counts == [1, 1, 1, 2, 2, 1]


def test_limits_have_vllms_forms():
    sized = {"image": {"count": 2, "width": 512, "height": 256}, "video": {"count": 1, "num_frames": 32}}
    assert media_limits("limit", sized) == {
        "image": MediaLimit(count=2, width=512, height=256),
        "video": MediaLimit(count=1, num_frames=32),
    }
    assert media_limits("limit", {"image": 0, "audio": 0}) == {"image": MediaLimit(count=0)}
    for wrong, why in (
        ({"audio": 2}, "modality 'audio'"),
        ({"image": -1}, "at least 0"),
        ({"image": {"width": 0, "height": 1}}, "at least 1"),
        ({"image": {"width": 3}}, "both width and height"),
        ({"image": {"num_frames": 3}}, "'num_frames', which does not exist"),
        ({"image": "many"}, "integer"),
        (3, "must be a dict"),
    ):
        with pytest.raises(ValidationError, match=why):
            media_limits("limit", wrong)
    assert domains("hosts", ["Example.org"]) == ("Example.org",)
    with pytest.raises(ValidationError, match="names of hosts"):
        domains("hosts", ["http://example.org"])


def test_encoded_items_stay_until_their_rows_are_wanted():
    def item(name: str, size: int) -> MediaItem:
        return MediaItem(content_hash=name, grid=Grid(2, 2 * size), num_tokens=size, pixels=np.zeros(0))

    cache, (a, b, c, d) = EncoderCache(10), (item(name, size) for name, size in zip("abcd", (4, 4, 4, 10), strict=True))
    rows = {x.content_hash: cache.allocate(x) for x in (a, b)}
    assert sorted([*rows["a"], *rows["b"]]) == sorted(set(rows["a"]) | set(rows["b"])) and min(rows["a"]) > 0
    assert not cache.can_hold(4) and cache.num_used == 8
    cache.release(a)
    assert cache.can_hold(4) and np.array_equal(cache.acquire(a), rows["a"])  # pyright: ignore
    cache.release(a)
    cache.release(b)
    assert cache.acquire(b) is not None
    assert set(cache.allocate(c)) <= {*range(1, 11)} - set(rows["b"])
    assert cache.acquire(a) is None and cache.acquire(b) is not None
    for x in (b, b, c):
        cache.release(x)
    assert not cache.num_used and sorted(cache.allocate(d)) == list(range(1, 11))
    cache.release(d)
    cache.forget(d)
    assert cache.acquire(d) is None and cache.can_hold(10)


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

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(OSError):  # who asked may have gone
                self.answer()

        def answer(self) -> None:
            paths.append(self.path)
            drops = 100 if self.path.startswith("/drops") else 0
            data = encoded(picture(28, 28), "PNG")
            self.send_response(200)
            for drop in range(drops * (self.path == "/drops-of-head")):
                self.send_header(f"X-{drop}", "x")
                self.flush_headers()
                time.sleep(0.02)
            self.send_header("Content-Length", str(len(data) + 100 * (self.path == "/short")))
            self.end_headers()
            for byte in range(drops):
                self.wfile.write(data[byte : byte + 1])
                time.sleep(0.02)
            self.wfile.write(data[drops:])

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", paths
        server.shutdown()
        thread.join()


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
    with pytest.raises(ValidationError, match="cannot be read"):
        reader().of_conversation({**asked(image_url(f"{url}/one")), "multi_modal_data": ["none"]})
    # each drop is there in time, and all of them are not
    monkeypatch.setattr("jaxllm.multimodal.access.SECONDS", 0.3)
    for path in ("drops", "drops-of-head"):
        with pytest.raises(ValidationError, match=r"cannot be fetched: .*(seconds|timed out)"):
            reader().of_conversation(asked(image_url(f"{url}/{path}")))


def test_names_of_contents_are_of_their_salt():
    def names(uuid: str | None, **salt: str) -> str:
        given = {"multi_modal_data": {"image": picture(28, 28)}, "multi_modal_uuids": {"image": [uuid]}, **salt}
        return reader().read(given)[0].items[0].content_hash

    assert names("own") == names("own") and names("own", cache_salt="a") == names("own", cache_salt="a")
    assert len({names("own"), names("own", cache_salt="a"), names("own", cache_salt="b"), names("('a', 'own')")}) == 4
    # what is named by its pixels is the same for all
    assert names(None) == names(None, cache_salt="a")


def test_time_is_part_of_what_blocks_depend_on():
    frames = [picture(28, 28)] * 2
    slow, fast = (reader().read({"multi_modal_data": {"video": (frames * 2, {"fps": fps})}}) for fps in (1.0, 4.0))
    keys = [[i.key for i in reader().place([VIDEO], media)[1].items] for media in (slow, fast)]
    assert keys[0][0] == keys[1][0] and keys[0][1] != keys[1][1]
    assert isinstance(slow[0], Media) and slow[0].items[0].content_hash == slow[0].items[1].content_hash
