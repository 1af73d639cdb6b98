"""Pictures in prompts, end to end: tokens and log-probabilities are those of transformers, in every company."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import image_answers
from support.image_answers import counter, drawn
from support.local_host import Handler, local_host, send
from support.pictures import broken, encoded
from support.seeing_models import END, IMAGE, QWEN_PICTURE, START, VIDEO, picture, write_seeing_model
from support.serving import served

from jaxllm import LLM, AsyncLLM, BeamSearchParams, LateChunkingParams, PoolingParams, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import RequestOutput
from jaxllm.config.engine_args import EngineArgs
from jaxllm.config.media import media_limits
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.multimodal.items import Media
from jaxllm.multimodal.qwen_processor import QwenProcessor
from jaxllm.startup.setup import read_setup

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 200,
    "max_num_seqs": 4,
    # the largest picture has twice as many
    "max_num_batched_tokens": 28,
    "block_size": 8,
    # less than four requests of the longest prompts fill
    "num_gpu_blocks_override": 27,
    "enforce_eager": True,
    "limit_mm_per_prompt": {"image": 3},
    "allowed_media_domains": ["nowhere.invalid", "127.0.0.1"],
}
TOKENS = 44
ASKED = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="module", params=["qwen2_5_vl", pytest.param("qwen2_vl", marks=pytest.mark.thorough)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeing_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, **ARGUMENTS, allowed_local_media_path=str(model)) as engine:
        yield engine


@pytest.fixture(scope="module")
def theirs(model: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()


prompt = functools.partial(image_answers.prompt, "qwen2_vl")


def prepared(pictures: Sequence[Any]) -> dict[str, Any]:
    """What transformers makes of pictures."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 64)
    return dict(processor(list(pictures), return_tensors="pt")) if pictures else {}


def inputs(theirs: Any, ids: Any, first: int, pictures: Sequence[Any], videos: Sequence[Media] = ()) -> dict[str, Any]:
    """What transformers' model takes besides tokens, of which the prompt's are those before `first`."""
    given, kinds = {}, (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    if pictures:
        given |= prepared(pictures)
    if videos:
        mean, deviation = (np.asarray(x, np.float32)[:, None] for x in QwenProcessor.of({}, {}).normal)
        pixels = np.concatenate([item.pixels for video in videos for item in video.items])
        pixels = ((pixels.reshape(len(pixels), 3, -1) / np.float32(255) - mean) / deviation).reshape(pixels.shape)
        grids = [[len(video.items), *video.items[0].grid] for video in videos]
        given |= {"pixel_values_videos": torch.tensor(pixels), "video_grid_thw": torch.tensor(grids)}
    if given:
        times = {}
        if videos and "2_5" in type(theirs).__name__:
            # time_step is of two positions a second
            times = {"second_per_grid_ts": torch.tensor([video.time_step / 2 for video in videos])}
        grids = {name: grid for name, grid in given.items() if name.endswith("_thw")}
        # what is generated goes on behind the highest position of the prompt
        own, _ = theirs.model.get_rope_index(ids[:, :first], kinds[:, :first], **grids, **times)
        behind = own.max() + 1 + torch.arange(ids.shape[1] - first).expand(3, 1, -1)
        given |= {"mm_token_type_ids": kinds, "position_ids": torch.cat([own, behind], dim=-1)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}


def check(theirs: Any, output: RequestOutput, pictures: Sequence[Any], videos: Sequence[Media] = ()) -> None:
    """What a prompt got is what transformers' model says of its tokens, and of the prompt's own, too."""
    prompt_ids = list(output.prompt_token_ids or [])
    ids = torch.tensor([prompt_ids + list(output.outputs[0].token_ids)])
    with torch.no_grad():
        scores = theirs(**inputs(theirs, ids, len(prompt_ids), pictures, videos)).logits[0]
    image_answers.check(output, scores)


def test_tokens_and_logprobs_are_transformers(llm: LLM, theirs: Any):
    """In chunks that cut pictures, in one batch with texts, and with a pool that is too small for all of them."""
    made = drawn()
    before = counter(llm, "vllm:num_preemptions")
    params = [ASKED] * len(made)
    params[4] = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    outputs = llm.generate([prompt(text, *given) for text, given in made.items()], params, use_tqdm=False)
    assert counter(llm, "vllm:num_preemptions") > before
    for output, given in zip(outputs, made.values(), strict=True):
        check(theirs, output, given)


@pytest.mark.thorough
@pytest.mark.parametrize(("rows", "chunk"), [(1, 7), (16, 100)])
def test_batches_and_chunks_of_other_sizes(model: Path, theirs: Any, rows: int, chunk: int):
    """One request at a time, a few tokens of a picture each step, and all of them twice in one batch."""
    made = drawn()
    asked = [prompt(text, *given) for text, given in made.items()] * 2
    arguments = {"max_num_seqs": rows, "max_num_batched_tokens": chunk, "num_gpu_blocks_override": 27 * min(rows, 8)}
    with LLM(model, **{**ARGUMENTS, **arguments}) as engine:
        outputs = engine.generate(asked, ASKED, use_tqdm=False)
    for output, given in zip(outputs, [*made.values()] * 2, strict=True):
        check(theirs, output, given)


def test_videos(llm: LLM, theirs: Any):
    """Frames in time, of two videos and a picture, and what follows a video whose time outlasts it."""
    processor = QwenProcessor.of(
        {"tokens_per_second": 2} if "2_5" in type(theirs).__name__ else {}, {"min_pixels": 784, "max_pixels": 784 * 64}
    )
    film = [picture(84, 56, seed=seed) for seed in range(7)]
    short, slow = np.stack([np.asarray(frame) for frame in film[:2]]), (film, {"fps": 0.5})
    mark = QWEN_PICTURE.replace("image", "video")
    given = picture(60, 60)
    prompts = [
        {
            "prompt": f"{mark} and {QWEN_PICTURE} or {mark}.",
            "multi_modal_data": {"image": given, "video": [slow, short]},
        },
        {"prompt": f"a {mark}", "multi_modal_data": {"video": film}},
    ]
    outputs = llm.generate(prompts, ASKED, use_tqdm=False)
    check(theirs, outputs[0], [given], [processor.video(slow), processor.video(short)])
    check(theirs, outputs[1], [], [processor.video(film)])


def test_prefixes_with_equal_pictures_hit_and_others_do_not(llm: LLM, theirs: Any):
    llm.reset_prefix_cache()
    text, own, other = "look at @ and say", picture(150, 150), picture(150, 150, seed=1)

    def hits(given: Any) -> int:
        before = counter(llm, "vllm:prefix_cache_hits")
        (output,) = llm.generate([prompt(text, given)], ASKED, use_tqdm=False)
        check(theirs, output, [given])
        return counter(llm, "vllm:prefix_cache_hits") - before

    beginning = len("look at ") // 8 * 8
    assert hits(own) == 0
    # 8 for the text, 1 for the mark, 25 for the picture
    assert hits(own) == 40 and hits(picture(150, 150)) == 40
    assert hits(other) == beginning


def test_forms_of_pictures(llm: LLM, tmp_path: Path):
    """The same pixels give the same tokens, in whatever form they come, and as tokens that stand for each vector."""
    given = picture(100, 70)
    path = tmp_path / "picture.png"
    given.save(path)
    forms = [given, np.asarray(given), np.moveaxis(np.asarray(given), -1, 0), path, str(path), path.read_bytes()]
    outputs = llm.generate([prompt("see @ now", form) for form in forms], ASKED, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert tokens == tokens[:1] * len(forms)
    whole = {"prompt_token_ids": outputs[0].prompt_token_ids, "multi_modal_data": {"image": given}}
    assert list(llm.generate([whole], ASKED, use_tqdm=False)[0].outputs[0].token_ids) == tokens[0]
    small = prompt("see @ now", given, mm_processor_kwargs={"max_pixels": 28 * 28 * 2})
    assert len(llm.generate([small], ASKED, use_tqdm=False)[0].prompt_token_ids or []) == len("see  now") + 2 + 1


def test_what_is_wrong_fails_alone(llm: LLM, tmp_path: Path):
    """Each with the reason, and the others beside it run."""
    good, ok = picture(56, 56), prompt("fine @", picture(56, 56))
    buffer = io.BytesIO()
    good.save(buffer, "PNG")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    wrong = {
        "At most 3 image(s) may be provided in one prompt": prompt("@@@@", *[good] * 4),
        "expected there to be 1 prompt placeholders": prompt("none", good),
        "expected there to be 1 prompt placeholders corresponding": prompt("@ @", good),
        "no picture that Pillow can read": prompt("@", buffer.getvalue()[:80]),
        "are no picture": prompt("@", str(text)),
        "cannot be read": prompt("@", str(tmp_path / "missing.png")),
        "must be a picture": prompt("@", {"not": "one"}),
        "got shape (0, 3, 3)": prompt("@", np.zeros((0, 3, 3), np.uint8)),
        "aspect ratio must be smaller than 200": prompt("@", picture(2000, 4)),
        "which the model does not take": {"prompt": QWEN_PICTURE, "multi_modal_data": {"audio": good}},
        "which is not supported; supported: min_pixels": prompt("@", good, mm_processor_kwargs={"crop": 1}),
        "to be 0 prompt placeholders": prompt("@"),
        "to be 0 prompt placeholders corresponding": prompt("@", multi_modal_data={"image": None}),
        "found 4 prompt placeholders": {"prompt_token_ids": [START, *[IMAGE] * 4, END]},
        "multi_modal_uuids": prompt("@", good, multi_modal_uuids={"image": ["a", "b"]}),
        "has planned for 64 an item": prompt("@", picture(600, 600), mm_processor_kwargs={"max_pixels": 28 * 28 * 100}),
    }
    prompts = [item for each in wrong.values() for item in (each, ok)]
    outputs = llm.generate(prompts, ASKED, use_tqdm=False, on_error="return")
    for why, output, beside in zip(wrong, outputs[::2], outputs[1::2], strict=True):
        assert why.lower() in (output.error or "").lower()
        assert beside.error is None and len(beside.outputs[0].token_ids) == TOKENS
    with pytest.raises(ValidationError, match="beam_search takes no images"):
        llm.beam_search([prompt("@", good)], BeamSearchParams(beam_width=2, max_tokens=2))
    core: Any = llm.engine.core
    scheduler = core.scheduler
    assert scheduler.media is not None and not scheduler.has_unfinished and not scheduler.media.cache.num_used


@pytest.mark.parametrize("count", [5, pytest.param(500, marks=pytest.mark.thorough)])
def test_broken_files_leave_no_request_behind(llm: LLM, count: int):
    """Each of many files of every kind gets an answer or a reason, and so does the text beside it."""
    files = [encoded(picture(20, 20), form) for form in ("PNG", "JPEG", "WEBP", "GIF")]
    random = np.random.default_rng(count)
    asked: list[Any] = [prompt("@", broken(data, random)) for _ in range(count) for data in files]
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    outputs = llm.generate([*asked, "a text"], one, use_tqdm=False, on_error="return")
    told = [output.error for output in outputs]
    assert told[-1] is None and any(told)
    assert all(output.error or len(output.outputs[0].token_ids) == 1 for output in outputs)
    core: Any = llm.engine.core
    scheduler = core.scheduler
    assert not scheduler.has_unfinished and not scheduler.media.cache.num_used
    assert not scheduler.kv_cache_manager.pool.num_used


def test_conversations(llm: LLM, model: Path, tmp_path: Path):
    """Parts of messages are pictures, from wherever they may be read; templates that take texts get them in front."""
    given, buffer = picture(100, 70), io.BytesIO()
    given.save(buffer, "PNG")
    (model / "inside.png").write_bytes(buffer.getvalue())
    (tmp_path / "outside.png").write_bytes(buffer.getvalue())
    (model / "link.png").symlink_to(tmp_path / "outside.png")
    data = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def asked(part: Any) -> list[Any]:
        return [{"role": "user", "content": [{"type": "text", "text": "see "}, part, {"type": "text", "text": " now"}]}]

    urls = [data, f"file://{model}/inside.png", f"{model}/inside.png", "inside.png"]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    parts += [{"type": "image", "image": given}, {"type": "image_pil", "image_pil": given}]
    outputs = llm.chat([asked(part) for part in parts], ASKED, use_tqdm=False)
    (plain,) = llm.generate([prompt("user: see @ now", given)], ASKED, use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [list(plain.outputs[0].token_ids)] * len(parts)
    messages = {"messages": asked({"type": "image"}), "multi_modal_data": {"image": given}}
    (output,) = llm.generate([messages], ASKED, use_tqdm=False)
    assert output.outputs[0].token_ids == plain.outputs[0].token_ids
    (output,) = llm.chat(
        asked(parts[0]), ASKED, use_tqdm=False, chat_template_content_format="string",
        mm_processor_kwargs={"max_pixels": 28 * 28 * 2},
    )  # fmt: skip
    ids = list(output.prompt_token_ids or [])
    assert ids[:9] == [*plain.prompt_token_ids[:6], START, IMAGE, END]  # pyright: ignore[reportOptionalSubscript]
    refused = {
        "must be a subpath": f"file://{tmp_path}/outside.png",
        "must be a subpath of": f"{model}/link.png",
        "must be a subpath of the": f"{model}/../outside.png",
        "cannot be read": f"{model}/missing.png",
        "must be from one of the allowed domains": "http://example.org/picture.png",
        "cannot be fetched": "http://nowhere.invalid/picture.png",
        "either a HTTP, data or file URL": "ftp://example.org/picture.png",
        "no base64": "data:image/png;base64,????",
        "are no picture": "data:image/png;base64,AAAA",
    }
    conversations = [asked({"type": "image_url", "image_url": {"url": url}}) for url in refused.values()]
    conversations += [asked({"type": "video", "video": [f"{tmp_path}/outside.png"] * 2})]
    conversations += [asked({"type": "image"}), asked({"type": "input_audio", "input_audio": {}})]
    outputs = llm.chat(conversations, ASKED, use_tqdm=False, on_error="return")
    for why, output in zip(
        [*refused, "must be a subpath", "has nothing of its own", "only text"], outputs, strict=True
    ):
        assert why in (output.error or "")


#: why nothing was read
NOT_READ = ("subpath of the", "allowed domains", "not read so far", "got list: ['/")


def test_conversations_over_http(llm: LLM, model: Path, tmp_path: Path):
    """OpenAI's client sends pictures in its messages, and reads nothing of the host that its owner did not name."""
    openai = pytest.importorskip("openai")
    given, buffer = picture(100, 70), io.BytesIO()
    given.save(buffer, "PNG")
    (tmp_path / "outside.png").write_bytes(buffer.getvalue())
    data = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    asked: dict[str, Any] = {"model": "m", "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}

    def messages(kind: str, url: Any) -> list[Any]:
        part = {"type": kind, kind: url}
        return [{"role": "user", "content": [{"type": "text", "text": "see "}, part]}]

    (expected,) = llm.chat(messages("image_url", {"url": data}), ASKED, use_tqdm=False)
    engine = AsyncLLM.__new__(AsyncLLM)
    engine._drive(llm)
    try:
        with served(engine, model_names=("m",)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            body = {"ignore_eos": True, "return_token_ids": True}
            talk = messages("image_url", {"url": data})
            answer = client.chat.completions.create(**{**asked, "extra_body": body}, messages=talk)
            assert answer.choices[0].token_ids == list(expected.outputs[0].token_ids)[:6]
            parts: Any = [{"type": "input_text", "text": "see "}, {"type": "input_image", "image_url": data}]
            told = client.responses.create(
                **{"model": "m", "temperature": 0, "max_output_tokens": 6, "extra_body": {"ignore_eos": True}},
                input=[{"role": "user", "content": parts}],
            )
            assert told.output_text == answer.choices[0].message.content
            outside = str(tmp_path / "outside.png")
            for kind in ("image_url", "image", "image_pil", "input_image", "video_url", "video"):
                for place in (outside, f"file://{outside}", {"url": outside}, [outside], "http://169.254.169.254/x"):
                    with pytest.raises(openai.BadRequestError) as refusal:
                        client.chat.completions.create(**asked, messages=messages(kind, place))
                    assert any(why in str(refusal.value) for why in NOT_READ), (kind, place, refusal.value)
    finally:
        engine._thread.close()


def test_texts_do_not_wait_for_pictures(llm: LLM):
    """A host that does not answer holds up the prompt that names it."""
    asked, answer = threading.Event(), threading.Event()

    def slowly(request: Handler) -> None:
        asked.set()
        answer.wait(60)
        send(request, 404)

    async def both(engine: AsyncLLM, url: str) -> None:
        part = {"type": "image_url", "image_url": {"url": url}}

        async def outputs(given: Any) -> list[RequestOutput]:
            return [output async for output in engine.generate(given, SamplingParams(max_tokens=2, ignore_eos=True))]

        waiting = asyncio.create_task(outputs({"messages": [{"role": "user", "content": [part]}]}))
        assert await asyncio.to_thread(asked.wait, 60)
        done = await asyncio.wait_for(outputs("a text"), 60)
        assert len(done[-1].outputs[0].token_ids) == 2 and not waiting.done()
        answer.set()
        with pytest.raises(ValidationError, match="cannot be fetched"):
            await waiting

    engine = AsyncLLM.__new__(AsyncLLM)
    engine._drive(llm)
    with local_host(slowly) as url:
        try:
            asyncio.run(both(engine, f"{url}/x.png"))
        finally:
            answer.set()
            engine._thread.close()


def test_what_comes_again_is_not_prepared_again(llm: LLM):
    """Of one call, whose pictures are read beside each other, and of later ones."""
    names = "vllm:mm_cache_queries", "vllm:mm_cache_hits", "jaxllm:encoder_cache_queries", "jaxllm:encoder_cache_hits"
    before = [counter(llm, name) for name in names]
    few = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    asked = [prompt(f"{number} @", picture(90, 60, seed=9)) for number in range(3)]
    first, second = (llm.generate(asked, few, use_tqdm=False) for _ in range(2))
    assert [o.outputs[0].token_ids for o in first] == [o.outputs[0].token_ids for o in second]
    now = [counter(llm, name) for name in names]
    queries, hits, encoder_queries, encoder_hits = np.subtract(now, before).tolist()
    assert queries == 6 and 3 <= hits <= 5
    assert encoder_queries >= 3 and encoder_hits >= 2


def test_names_of_contents_stand_for_them(llm: LLM):
    """Pictures of one `multi_modal_uuids` are taken for the same one, and hit."""
    llm.reset_prefix_cache()
    named = {"multi_modal_uuids": {"image": "one"}}
    outputs = [
        llm.generate([prompt("look at @ and", picture(150, 150, seed=seed), **named)], ASKED, use_tqdm=False)[0]
        for seed in range(2)
    ]
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids
    assert [output.num_cached_tokens for output in outputs] == [0, 32]


def test_what_does_not_go_with_pictures_is_refused(model: Path):
    together = {"data_parallel_size": 2, "enable_expert_parallel": True}
    for arguments in ({"enable_prompt_embeds": True}, together, {"load_format": "null"}):
        with pytest.raises(ValidationError, match="for a model that sees images"):
            LLM(model, **{**ARGUMENTS, **arguments})


def test_pictures_are_pooled(model: Path, theirs: Any):
    """In chunks that cut them; a prefix that hits ends in one."""
    made = drawn()
    asked = [prompt(text, *given) for text, given in made.items()]
    with LLM(model, **ARGUMENTS, runner="pooling") as engine:
        first, second = (engine.embed(asked, use_tqdm=False) for _ in range(2))
        with pytest.raises(ValidationError, match="a prompt with images is not cut"):
            engine.embed(asked[:1], truncate_prompt_tokens=5, use_tqdm=False)
        # of one vector, as many tokens as its text has
        late = PoolingParams(late_chunking_params=LateChunkingParams(5))
        with pytest.raises(ValidationError, match="Late chunking requires nonempty plain-text input"):
            engine.encode([prompt("see @", picture(28, 28))], late, pooling_task="token_embed", use_tqdm=False)
        core: Any = engine.engine.core
        assert not core.scheduler.media.cache.num_used
    assert any(output.num_cached_tokens for output in second)
    for output, again, given in zip(first, second, made.values(), strict=True):
        ids = torch.tensor([output.prompt_token_ids])
        with torch.no_grad():
            hidden = theirs.model(**inputs(theirs, ids, ids.shape[1], given)).last_hidden_state[0, -1]
        expected = (hidden / hidden.norm()).numpy()
        for found in (output, again):
            np.testing.assert_allclose(found.outputs.embedding, expected, atol=1e-4)


def test_pictures_that_are_not_cut_need_room_in_a_step(model: Path):
    with pytest.raises(ValidationError, match="Set max_num_batched_tokens to at least 64"):
        LLM(model, **ARGUMENTS, disable_chunked_mm_input=True)


def test_the_text_of_a_model_that_sees_is_pooled_without_its_tower(model: Path):
    args = EngineArgs(
        model=str(model), runner="pooling", limit_mm_per_prompt=media_limits("", {"image": 0, "video": 0})
    )
    setup = read_setup(args, model)
    assert setup.pooler is not None and setup.media is None
    assert isinstance(setup.model, DecoderConfig) and setup.model.vision is None
