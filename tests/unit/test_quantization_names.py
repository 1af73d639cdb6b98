"""What `quantization` may be: vLLM's names of today and of before, in any case. Each is a method, or says in one line
what to take; a name that contradicts the checkpoint is refused with both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.quantized_checkpoints import FORMATS

from jaxllm.api.errors import ValidationError
from jaxllm.config.quantization import NAMES, weight_method
from jaxllm.weights.quantization.detect import ALIASES, ONLINE, REFUSED, quantization_method

#: configurations of checkpoints of every method
STORED: list[dict[str, Any]] = [
    *(config for config, _ in FORMATS.values()),
    {"quant_method": "mxfp4"},
    {"quant_method": "modelopt", "quant_algo": "MXFP8"},
    {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "FP8"}}},
]


@pytest.mark.parametrize("written", [str.upper, str.title, lambda name: f" {name} "])
def test_names_are_taken_in_any_case(written: Callable[[str], str]):
    assert [weight_method("quantization", written(name)) for name in NAMES] == list(NAMES)


def test_an_unknown_name_is_answered_with_those_that_do_something():
    with pytest.raises(ValidationError) as refused:
        weight_method("quantization", "gptq_marlim")
    said = str(refused.value)
    assert "is not known. Did you mean 'gptq_marlin'? Known are auto-round, awq, bitsandbytes" in said
    listed = said.partition("Known are ")[2].partition(";")[0].split(", ")
    assert len(listed) == 13 and not set(listed) & {*REFUSED, *ALIASES}
    with pytest.raises(ValidationError, match="'nothing of these' is not known. Known are"):
        weight_method("quantization", "nothing of these")


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_a_method_or_says_what_to_take(name: str):
    if name in REFUSED:
        with pytest.raises(ValidationError, match=f"'{name}' is not supported: .*(take|leave)") as refused:
            quantization_method(name, None)
        assert "\n" not in str(refused.value)
        return
    method = ALIASES.get(name, name)
    kinds = {_method(config) for config in STORED if _is_taken(name, config)}
    assert kinds == {method} & {_method(config) for config in STORED}
    assert _is_taken(name, None) == (method in ONLINE)
    assert _is_taken(name, None, is_gguf=True) == (method in ONLINE or method == "gguf")
    assert kinds or method in ONLINE or method == "gguf"


def _method(config: dict[str, Any]) -> str:
    kind: str = config["quant_method"]
    return ALIASES.get(kind, kind)


def _is_taken(name: str, stored: dict[str, Any] | None, *, is_gguf: bool = False) -> bool:
    """Whether a checkpoint is read by this name; if not, the error has both in one line."""
    try:
        return quantization_method(name, stored, is_gguf=is_gguf) is not None
    except ValidationError as error:
        said = str(error)
    other = "not quantized" if stored is None else repr(_method(stored))
    assert repr(name) in said and (".gguf" if is_gguf or name == "gguf" else other) in said and "\n" not in said, said
    return False
