"""Pictures of every kind are read, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.local_host import Handler, local_host, send
from support.pictures import broken, encoded
from support.seeing_models import picture

from jaxllm.api.errors import ValidationError
from jaxllm.multimodal.access import MediaAccess, encode_image_url, fetch_image
from jaxllm.multimodal.pictures import convert_image_mode, read_picture

Image = pytest.importorskip("PIL.Image")


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


def test_floats_are_numbers_up_to_1_or_up_to_255():
    numbers = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    for given in (numbers, numbers * 255):
        found = np.asarray(read_picture(Image.fromarray(given), "it"))[..., 0]
        np.testing.assert_allclose(found, numbers * 255, atol=1)


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
        try:
            assert read_picture(broken(data, random), "it").mode == "RGB"
        except ValidationError as error:
            assert str(error).startswith("it")
            refused += 1
    assert refused


def test_vllms_functions_for_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = picture(40, 30)
    given.save(tmp_path / "it.png")

    def one_file(asked: Handler) -> None:
        """Another place is told, as model hubs do."""
        if asked.path == "/it.png":
            send(asked, 200, (tmp_path / "it.png").read_bytes())
        else:
            send(asked, 302, headers={"Location": "/it.png"})

    monkeypatch.chdir(tmp_path)
    for url in (encode_image_url(given), f"file://{tmp_path}/it.png", str(tmp_path / "it.png"), "it.png"):
        np.testing.assert_array_equal(np.asarray(fetch_image(url)), np.asarray(given))
    with local_host(one_file) as url:
        np.testing.assert_array_equal(np.asarray(fetch_image(f"{url}/elsewhere")), np.asarray(given))
        with pytest.raises(ValidationError, match="cannot be fetched: HTTP Error 302"):
            MediaAccess("", ["127.0.0.1"]).read(f"{url}/elsewhere", "image_url")
    with pytest.raises(ValidationError, match="'http://nowhere.invalid/it.png' cannot be fetched"):
        fetch_image("http://nowhere.invalid/it.png")
    seen_through = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert convert_image_mode(seen_through, "RGB").getpixel((0, 0)) == (255, 255, 255)
    assert convert_image_mode(seen_through, "L").mode == "L"
