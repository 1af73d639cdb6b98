"""What becomes of pictures and videos before the encoder, and where they stand in a prompt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.pictures import PROCESSOR, normal, reader, reader_of
from support.seeing_models import IMAGE, MARKS, VIDEO, VISION, picture
from support.tiny_model import byte_tokenizer
from tokenizers import AddedToken

from jaxllm.api.errors import ValidationError
from jaxllm.config.media import MediaLimit, domains, media_limits
from jaxllm.engine.io.pooling_inputs import PoolingReader, TextPair
from jaxllm.engine.io.prompts import PreparedPrompt, PromptReader, holds_media
from jaxllm.multimodal.items import Grid, Media
from jaxllm.multimodal.processor_cache import ProcessorCache
from jaxllm.multimodal.qwen_processor import QwenProcessor
from jaxllm.tokenization.chat import ChatRenderer

Image = pytest.importorskip("PIL.Image")


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
    own = reader_of({"image": processor, "video": processor})
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
        assert media.rope_offsets is not None
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
    off = reader_of({"image": PROCESSOR}, video=0)
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


def test_smaller_pictures_than_the_limit_have_room():
    """Of any form: also where pixels are bounded, and one as large as the limit loses more in rounding than others."""
    bounded = PROCESSOR.with_options({"max_pixels": 28 * 28 * 61})
    for width, height in ((260, 260), (60, 90)):
        sizes = ((w, h) for w in range(1, width + 1, 3) for h in range(1, height + 1, 3) if max(w, h) < 100 * min(w, h))
        most = max(bounded.tokens_of(*size) for size in sizes)
        assert most <= bounded.tokens_within(width, height) <= bounded.most_tokens
    assert bounded.tokens_of(260, 260) == 49 < bounded.tokens_within(260, 260)
    assert PROCESSOR.tokens_within(112, 84) == PROCESSOR.tokens_of(112, 84) == 4 * 3
    # which has fewer pixels than any is made of
    assert PROCESSOR.tokens_within(60, 90) == PROCESSOR.tokens_of(1, 90) == 10
    # of longer sides some forms are looked at, and here all of them are too narrow
    assert PROCESSOR.tokens_within(10**9, 1) == PROCESSOR.most_tokens <= PROCESSOR.tokens_within(10**9, 10**9)


@pytest.mark.parametrize("tokens", [1, 20, 61])
def test_a_picture_of_few_pixels_has_room(tokens: int):
    """Its sides are rounded up, so that it may have more of them than a picture of `max_pixels`."""
    same = PROCESSOR.with_options({"min_pixels": 784 * tokens, "max_pixels": 784 * tokens})
    sizes = [(w, h) for w in range(1, 121) for h in range(1, 91) if max(w, h) < 200 * min(w, h)]
    grown = {size: same.tokens_of(*size) for size in sizes if size[0] * size[1] < 784 * tokens}
    assert tokens < max(grown.values()) <= same.tokens_within(120, 90) <= same.most_tokens
    few = {size: count for size, count in grown.items() if size[0] <= 30 and size[1] <= 20}
    assert max(few.values()) <= same.tokens_within(30, 20)


def test_nothing_stands_for_what_was_named_before():
    own = reader(cache=ProcessorCache(2**20))
    named: dict[str, Any] = {"multi_modal_uuids": {"image": "it"}}
    for none in (None, [None]):
        with pytest.raises(ValidationError, match="image: Cache miss for image but data is not provided"):
            own.read({"multi_modal_data": {"image": none}, **named})
    (first,) = own.read({"multi_modal_data": {"image": picture(56, 56)}, **named})
    for none in (None, [None]):
        assert own.read({"multi_modal_data": {"image": none}, **named}) == [first]
    film = {"multi_modal_data": {"video": [[picture(56, 56)] * 2]}, "multi_modal_uuids": {"video": ["a film"]}}
    assert own.read(film) == own.read({**film, "multi_modal_data": {"video": [None]}})
    parts = [{"type": "image_url", "image_url": None, "uuid": "it"}, {"type": "image", "uuid": "it"}]
    asked = {"messages": [{"role": "user", "content": parts}]}
    assert own.read(own.of_conversation(asked)) == [first, first]
    for part in ({"type": "image_url", "image_url": None}, {"type": "image"}):
        with pytest.raises(ValidationError, match="must have a URL|has nothing of its own"):
            own.of_conversation({"messages": [{"role": "user", "content": [part]}]})


def test_pairs_of_texts_have_no_places():
    """A mark that nothing stands for is refused in a pair as in any other prompt."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS["qwen2_5_vl"]])
    transformers = pytest.importorskip("transformers")
    fast: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    prompts: Any = SimpleNamespace(media=reader(), read=lambda *_: [])
    good, bad = PoolingReader(prompts, fast, False).read([TextPair("a", "b"), TextPair("a", "<|image_pad|>")])
    assert isinstance(good, PreparedPrompt)
    assert isinstance(bad, ValidationError) and "corresponding to 0 image items" in str(bad)


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


@pytest.mark.parametrize("key", ["multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs"])
def test_arrays_in_the_place_of_dicts_fail_alone(key: str):
    bad = {"prompt_token_ids": [1, IMAGE], key: np.zeros((2, 2))}
    asks = {"messages": [{"role": "user", "content": [{"type": "image", "image": picture(28, 28)}]}], key: bad[key]}
    assert holds_media(bad) and holds_media({"prompt": "a", key: [1]}) and not holds_media({"prompt": "a", key: {}})
    for media, message in ((reader(), f"{key} must be a dict such as"), (None, f"the prompt has {key!r}, and this")):
        own = PromptReader(None, ChatRenderer(None, None), 100, media=media)
        refused, read = own.read([bad, {"prompt_token_ids": [1, 2]}])
        assert message in str(refused) and isinstance(read, PreparedPrompt) and read.token_ids == [1, 2]
    with pytest.raises(ValidationError, match=f"{key} must be a dict such as"):
        reader().of_conversation(asks)
