"""Prepared pictures that come again are not prepared again, and never taken for others."""

from __future__ import annotations

import concurrent.futures
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pictures import encoded, reader_of
from support.seeing_models import picture

from jaxllm.api.errors import ValidationError
from jaxllm.multimodal.processor_cache import ProcessorCache, content_key
from jaxllm.multimodal.prompts import MediaReader
from jaxllm.multimodal.qwen_processor import QwenProcessor

Image = pytest.importorskip("PIL.Image")
PROCESSOR = QwenProcessor.of({}, {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 64})


def cached(max_bytes: int = 2**20, max_model_len: int = 1000) -> MediaReader:
    own = reader_of({"image": PROCESSOR, "video": PROCESSOR}, max_model_len)
    own.cache = ProcessorCache(max_bytes)
    return own


def read(own: MediaReader, given: Any, modality: str = "image", **others: Any) -> Any:
    return own.read({"multi_modal_data": {modality: given}, **others})[0]


def counts(own: MediaReader) -> tuple[int, int]:
    assert own.cache is not None
    return own.cache.num_queries, own.cache.num_hits


def test_what_comes_again_is_there(tmp_path: Path):
    own, given = cached(), picture(60, 40)
    path = tmp_path / "picture.png"
    given.save(path)
    for form, again in (
        (given, given.copy()),
        (np.asarray(given), np.asarray(given).copy()),
        (path, str(path)),
        (path.read_bytes(), path),
    ):
        first = read(own, form)
        assert read(own, again) is first
    film = [picture(56, 56, seed=seed) for seed in range(3)]
    first = read(own, [film], "video")
    assert read(own, [list(film)], "video") is first
    assert read(own, [(film, {"fps": 4.0})], "video") is not first
    named: dict[str, Any] = {"multi_modal_uuids": {"image": "own"}}
    assert read(own, given, **named) is read(own, picture(20, 20), **named)
    path.write_bytes(encoded(picture(60, 40, seed=1), "PNG"))
    assert read(own, path).items[0].content_hash != read(own, given).items[0].content_hash


def test_options_and_pixels_tell_pictures_apart():
    own, given = cached(), picture(200, 100)
    first = read(own, given)
    assert read(own, given, mm_processor_kwargs={"max_pixels": 28 * 28}).num_tokens < first.num_tokens
    grey = np.zeros((56, 28), np.uint8)
    kinds = [grey, grey.T.copy(), grey.astype(np.int16), np.stack([grey] * 3, -1), Image.fromarray(grey)]
    keys = [content_key(kind) for kind in kinds]
    assert len(set(keys)) == len(kinds) and None not in keys
    turned = Image.Exif()
    turned[0x0112] = 6
    for given in (
        Image.open(io.BytesIO(encoded(picture(40, 30), "JPEG", exif=turned))),
        picture(20, 20).convert("P"),
        Image.open(io.BytesIO(encoded(picture(20, 20), "PNG"))),  # not decoded: it may be anything
        {"not": "one"},
        [picture(20, 20), object()],
        np.array([object()]),
        "/nowhere/at/all.png",
    ):
        assert content_key(given) is None


def test_the_latest_stay():
    given = [picture(56, 56, seed=seed) for seed in range(3)]
    size = read(cached(), given[0]).items[0].pixels.nbytes
    own = cached(2 * size)
    first, second = read(own, given[0]), read(own, given[1])
    assert read(own, given[0]) is first
    read(own, given[2])
    assert read(own, given[0]) is first and read(own, given[1]) is not second
    assert counts(own) == (6, 2)
    tiny = cached(size - 1)
    assert read(tiny, given[0]) is not read(tiny, given[0])


def test_what_does_not_fit_is_refused_though_it_is_there():
    own = cached(max_model_len=20)
    read(own, picture(112, 112))
    with pytest.raises(ValidationError, match="image 1 becomes 16 tokens, and 4 are left"):
        own.read({"multi_modal_data": {"image": [picture(112, 112)] * 2}})


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_picture_that_is_not_decoded_yet_is_of_several_prompts(form: str, modality: str):
    """It is decoded by the first thread that needs it, and the others wait."""
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encoded(picture(500, 400), form, exif=turned)
    frames: Any = lambda shared: [[shared, shared]] if modality == "video" else shared  # noqa: E731
    own, wanted = cached(), read(cached(), frames(Image.open(io.BytesIO(data))), modality)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            given = frames(Image.open(io.BytesIO(data)))
            found = [pool.submit(read, own, given, modality) for _ in range(8)]
            assert {each.result().items[0].content_hash for each in found} == {wanted.items[0].content_hash}
