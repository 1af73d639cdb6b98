"""Prompts with pictures, and what transformers' models say of what they got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from support.seeing_models import PICTURE, SQUARE_IMAGE, picture

from jaxllm import LLM
from jaxllm.api.metric import Counter
from jaxllm.api.outputs import RequestOutput

#: text with "@" for each picture -> their sizes: odd ones, several of one prompt, one at each end, larger than a step,
#: equal ones
PICTURES = {
    "what is @ here?": [(100, 70)],
    "@ and @": [(70, 98), (33, 300)],
    "@": [(28, 28)],
    "a text": [],
    "between @, @ and @ there is": [(84, 28), (150, 40), (84, 28)],
    "the large @ one": [(500, 400)],
    "another text without": [],
    "@ first, then nothing else but a long text that fills some blocks": [(230, 230)],
}


def prompt(family: str, text: str, *pictures: Any, **others: Any) -> dict[str, Any]:
    """A prompt with each "@" of a text a picture."""
    data = {"multi_modal_data": {"image": list(pictures)}} if pictures else {}
    return {"prompt": text.replace("@", PICTURE[family]), **data, **others}


def drawn(texts: Mapping[str, Sequence[tuple[int, int]]] = PICTURES) -> dict[str, list[Any]]:
    """The pictures of each text."""
    return {text: [picture(*size) for size in sizes] for text, sizes in texts.items()}


def counter(llm: LLM, name: str) -> int:
    return next(int(m.value) for m in llm.get_metrics() if isinstance(m, Counter) and m.name == name)


def square_inputs(model: Any, processor: Any, ids: Any, pictures: Sequence[Any]) -> dict[str, Any]:
    """What transformers' model of square pictures takes besides tokens."""
    given = dict(processor(list(pictures), return_tensors="pt")) if pictures else {}
    given = {name: value for name, value in given.items() if name in ("pixel_values", "image_sizes")}
    if model.config.model_type == "gemma3":
        given["token_type_ids"] = (ids == SQUARE_IMAGE).int()
    return given


def check(output: RequestOutput, scores: Any) -> None:
    """What a prompt got is most likely by transformers' scores [tokens, vocabulary] of the prompt and of what it got,
    and as likely as they say, and so is the prompt's own, where that was asked for.
    """
    import torch

    prompt_ids, completion = list(output.prompt_token_ids or []), output.outputs[0]
    expected = torch.log_softmax(scores, -1).numpy()
    first = len(prompt_ids)
    for number, (token, found) in enumerate(zip(completion.token_ids, completion.logprobs or [], strict=True)):
        assert token == int(expected[first + number - 1].argmax())
        assert found[token].logprob == pytest.approx(expected[first + number - 1, token], abs=1e-4)
    for place, found in enumerate((output.prompt_logprobs or [])[1:], 1):
        assert found is not None
        assert found[prompt_ids[place]].logprob == pytest.approx(expected[place - 1, prompt_ids[place]], abs=1e-4)
