"""Square pictures of one size, end to end: Gemma 3, among whose tokens those of a picture see each other, and LLaVA.
Tokens and log-probabilities are those of transformers, in every company.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import image_answers
from support.image_answers import counter, drawn, prompt, square_inputs
from support.seeing_models import MARKS, PICTURE, SQUARE_IMAGE, picture, write_seeing_model

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import RequestOutput
from jaxllm.engine.scheduling.scheduler import Scheduler

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 144,
    "max_num_seqs": 4,
    # a picture has 16
    "max_num_batched_tokens": 28,
    "block_size": 8,
    "enforce_eager": True,
    "limit_mm_per_prompt": {"image": 3},
}
#: less than four requests of the longest prompts fill; Gemma 3 has two groups of layers
BLOCKS = {"gemma3": 26, "llava": 20, "llava-siglip": 20, "llava-next": 30}
TOKENS = 24
#: of a picture that is a square; of LLaVA-NeXT's of itself, and of two rows of two tiles, with rows' ends
VECTORS = {"gemma3": 16, "llava": 16, "llava-siglip": 16, "llava-next": 16 + 8 * 9}
ASKED = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)


@pytest.fixture(
    scope="module", params=["gemma3", "llava", "llava-next", pytest.param("llava-siglip", marks=pytest.mark.thorough)]
)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeing_model(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def llm(model: Path, family: str) -> Iterator[LLM]:
    longest = {"max_model_len": 200} if family == "llava-next" else {}
    with LLM(model, **{**ARGUMENTS, **longest}, num_gpu_blocks_override=BLOCKS[family]) as engine:
        yield engine


@pytest.fixture(scope="module")
def theirs(model: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor(model: Path) -> Any:
    return transformers.AutoImageProcessor.from_pretrained(model, backend="pil")


def check(theirs: Any, processor: Any, output: RequestOutput, pictures: Sequence[Any]) -> None:
    """What a prompt got is what transformers' model says of its tokens, and of the prompt's own, too."""
    prompt_ids, completion = list(output.prompt_token_ids or []), output.outputs[0]
    ids = torch.tensor([prompt_ids + list(completion.token_ids)])
    with torch.no_grad():
        own = square_inputs(theirs, processor, ids, pictures)
        scores = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), **own).logits[0]
    image_answers.check(output, scores)


def test_tokens_and_logprobs_are_transformers(llm: LLM, theirs: Any, processor: Any, family: str):
    """In chunks that would cut pictures, in one batch with texts, and with a pool that is too small for all of them."""
    made = drawn()
    before = counter(llm, "vllm:num_preemptions")
    params = [ASKED] * len(made)
    for number in (1, 4):
        params[number] = SamplingParams(
            temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, prompt_logprobs=0
        )
    outputs = llm.generate([prompt(family, *each) for each in _pairs(made)], params, use_tqdm=False)
    assert counter(llm, "vllm:num_preemptions") > before
    for output, (text, given) in zip(outputs, made.items(), strict=True):
        place, ids = PICTURE[family], list(output.prompt_token_ids or [])
        begin, end = (f"\n\n{place}", f"{MARKS[family][2]}\n\n") if family == "gemma3" else ("", "")
        # transformers' model refuses other numbers of vectors
        around = [token for token in ids if token != SQUARE_IMAGE]
        assert around == llm.get_tokenizer().encode(text.replace("@", begin + end))
        assert len(ids) - len(around) == len(given) * VECTORS[family] or family == "llava-next"
        assert output.prompt == text.replace("@", place)
        check(theirs, processor, output, given)


def _pairs(made: dict[str, list[Any]]) -> Iterator[tuple[Any, ...]]:
    return ((text, *given) for text, given in made.items())


@pytest.mark.thorough
@pytest.mark.parametrize(("rows", "chunk"), [(1, 16), (16, 100)])
def test_batches_and_chunks_of_other_sizes(
    model: Path, theirs: Any, processor: Any, family: str, rows: int, chunk: int
):
    """One request at a time, and all of them twice in one batch."""
    made = drawn()
    asked = [prompt(family, text, *given) for text, given in made.items()] * 2
    arguments = {"max_num_seqs": rows, "max_num_batched_tokens": chunk, "max_model_len": 200}
    with LLM(model, **{**ARGUMENTS, **arguments}, num_gpu_blocks_override=50 * min(rows, 8)) as engine:
        outputs = engine.generate(asked, ASKED, use_tqdm=False)
    for output, given in zip(outputs, [*made.values()] * 2, strict=True):
        check(theirs, processor, output, given)


def test_prefixes_with_equal_pictures_hit_and_others_do_not(llm: LLM, theirs: Any, processor: Any, family: str):
    """A hit may end within a picture, whose other tokens are computed with all of them in sight."""
    llm.reset_prefix_cache()
    text, own, other = "look at @ and say", picture(150, 150), picture(150, 150, seed=1)

    def hits(text: str, given: Any) -> int:
        before = counter(llm, "vllm:prefix_cache_hits")
        (output,) = llm.generate([prompt(family, text, given)], ASKED, use_tqdm=False)
        check(theirs, processor, output, [given])
        return counter(llm, "vllm:prefix_cache_hits") - before

    beginning = len("look at ")
    # behind the text: two lines' ends and a mark
    stop = beginning + VECTORS[family] + 3 * (family == "gemma3")
    assert hits(text, own) == 0
    assert hits(text, own) == (stop + len(" and say")) // 8 * 8 - 8 * (stop % 8 == 0)
    assert hits(text, other) == beginning // 8 * 8
    # ends with the picture: the last of its tokens are computed again
    llm.reset_prefix_cache()
    assert hits("look at @", own) == 0
    assert hits("look at @", own) == (stop + 3 * (family == "gemma3") - 1) // 8 * 8


def test_marks_in_token_ids(llm: LLM, family: str):
    """One token stands for a picture, or as many as it has vectors."""
    given = picture(100, 70)
    (expected,) = llm.generate([prompt(family, "see @ now", given)], ASKED, use_tqdm=False)
    ids = llm.get_tokenizer().encode(prompt(family, "see @ now")["prompt"])
    for form in (ids, list(expected.prompt_token_ids or [])):
        whole = {"prompt_token_ids": form, "multi_modal_data": {"image": given}}
        (output,) = llm.generate([whole], ASKED, use_tqdm=False)
        assert output.prompt_token_ids == expected.prompt_token_ids
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    part = {"type": "image", "image": given}
    messages = [{"role": "user", "content": [{"type": "text", "text": "see "}, part, {"type": "text", "text": " now"}]}]
    (output,) = llm.chat(messages, ASKED, use_tqdm=False)
    (plain,) = llm.generate([prompt(family, "user: see @ now", given)], ASKED, use_tqdm=False)
    assert output.prompt_token_ids == plain.prompt_token_ids
    refused = {
        "to be 0 prompt placeholders": prompt(family, "@"),
        "At most 3 image(s)": prompt(family, "@@@@", *[given] * 4),
        "which is not supported: ": prompt(family, "@", given, mm_processor_kwargs={"max_pixels": 100}),
        "which the model does not take": {"prompt": "a", "multi_modal_data": {"video": [given]}},
    }
    outputs = llm.generate(list(refused.values()), ASKED, use_tqdm=False, on_error="return")
    for why, output in zip(refused, outputs, strict=True):
        assert why in (output.error or ""), (why, output.error)


@pytest.mark.parametrize("family", ["gemma3"], indirect=True)
def test_a_step_has_room_for_a_picture(model: Path):
    with pytest.raises(ValidationError, match="Set max_num_batched_tokens to at least 16"):
        LLM(model, **{**ARGUMENTS, "max_num_batched_tokens": 12})


@pytest.mark.parametrize("family", ["gemma3"], indirect=True)
def test_few_vectors_are_made_in_a_step(
    model: Path, llm: LLM, family: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """One picture a step, in place of all that chunks need; the device has room for no more."""
    made: list[int] = []
    schedule = Scheduler.schedule

    def counting(self: Scheduler) -> Any:
        step = schedule(self)
        made.append(len(step.encoder_inputs))
        return step

    given = [picture(30, 30, seed=seed) for seed in range(3)]
    asked = [prompt(family, "@ and @", *given[:2]), prompt(family, "@", given[2])]
    expected = [output.outputs[0].token_ids for output in llm.generate(asked, ASKED, use_tqdm=False)]
    arguments = {**ARGUMENTS, "max_num_batched_tokens": 96, "max_num_encoder_input_tokens": 10}
    monkeypatch.setattr(Scheduler, "schedule", counting)
    with LLM(model, **arguments) as engine:
        assert "max_num_encoder_input_tokens (10) is less than the largest image has (16)" in caplog.text
        outputs = engine.generate(asked, ASKED, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert sum(made) == 3 and max(made) == 1
