"""Pooling engines end to end: who may call what, errors, preemption, saving."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.tiny_model import SMALL, write_tiny_model

from jaxllm import LLM, LateChunkingParams, PoolingParams
from jaxllm.api.pooler import PoolerConfig
from jaxllm.engine.client import EngineClient

PROMPTS = ["one", "two and three", "x" * 100, "the last one"]


@pytest.fixture(scope="module")
def pooling(tiny_model: Path) -> Iterator[LLM]:
    """Room for 13 blocks: long prompts push each other out."""
    with LLM(tiny_model, runner="pooling", **SMALL, num_gpu_blocks_override=17) as llm:
        yield llm


def vectors(llm: LLM, prompts: object, **kwargs: object) -> np.ndarray:
    return np.array([o.outputs.embedding for o in llm.embed(prompts, use_tqdm=False, **kwargs)])  # pyright: ignore


def test_only_what_the_engine_is_for(pooling: LLM, engine: LLM) -> None:
    for call in (pooling.generate, pooling.enqueue, pooling.stream):
        with pytest.raises(ValueError, match=r"LLM\.\w+\(\) is only supported for generative models"):
            call("x")
    with pytest.raises(ValueError, match="only supported for generative models"):
        pooling.chat([{"role": "user", "content": "x"}])
    for call in (engine.embed, engine.classify, lambda text: engine.encode(text, pooling_task="embed")):
        with pytest.raises(ValueError, match=r"LLM\.\w+\(\) is only supported for pooling models"):
            call("x")
    with pytest.raises(ValueError, match="pooling_task required"):
        pooling.encode("x")
    with pytest.raises(ValueError, match="Classification API is not supported"):
        pooling.classify("x")
    assert pooling.generate.__name__ == "generate" and vectors(pooling, "x").shape == (1, 64)


def test_one_bad_prompt_fails_alone(pooling: LLM) -> None:
    outputs = pooling.embed(["a", [999], "b" * 300, "c"], use_tqdm=False, on_error="return")
    assert [bool(o.error) for o in outputs] == [False, True, True, False]
    assert outputs[1].outputs.embedding == []
    # alone it is computed in a step of one token, which adds up in another order
    np.testing.assert_allclose([outputs[3].outputs.embedding], vectors(pooling, "c"), atol=1e-6)
    with pytest.raises(ValueError, match="out of vocabulary"):
        pooling.embed(["a", [999]], use_tqdm=False)
    assert vectors(pooling, "y" * 256).shape == (1, 64)  # all of max_model_len


def test_tables_and_their_columns(pooling: LLM) -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"number": [1, 2], "text": ["a", "b"]})
    np.testing.assert_array_equal(vectors(pooling, table["text"]), vectors(pooling, ["a", "b"]))
    for call in (pooling.embed, lambda data: pooling.score("a", data)):
        with pytest.raises(ValueError, match=r"is a DataFrame: give one of its columns, such as df\['text'\]"):
            call(table)
    missing: Any = float("nan")
    with pytest.raises(ValueError, match=r"data_2\[1\] is nan"):
        pooling.score("a", ["b", missing])


def test_long_prompts_wait_for_room(pooling: LLM) -> None:
    prompts = [character * 250 for character in "abcdefgh"]
    together = vectors(pooling, prompts)
    alone = np.concatenate([vectors(pooling, prompt) for prompt in prompts])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    tokens = pooling.encode(prompts, pooling_task="token_embed", use_tqdm=False)
    assert {o.outputs.data.shape for o in tokens} == {(250, 64)}
    np.testing.assert_allclose([o.outputs.data[-1] for o in tokens], alone, atol=1e-6)


def test_scores_one_with_many_and_pairs(pooling: LLM) -> None:
    many = [o.outputs.score for o in pooling.score(PROMPTS[0], PROMPTS, use_tqdm=False)]
    pairs = [o.outputs.score for o in pooling.score([PROMPTS[0]] * 4, PROMPTS, use_tqdm=False)]
    expected = vectors(pooling, PROMPTS)
    np.testing.assert_allclose(many, expected @ expected[0], atol=1e-6)
    assert many == pairs
    with pytest.raises(ValueError, match="1:1, 1:N or N:N"):
        pooling.score(PROMPTS[:2], PROMPTS, use_tqdm=False)
    with pytest.raises(ValueError, match="chat_template writes two texts into one prompt"):
        pooling.score("a", "b", use_tqdm=False, chat_template="{{ messages }}")


def test_dimensions(tiny_model: Path, pooling: LLM) -> None:
    whole = np.array(
        [o.outputs.data for o in pooling.encode(PROMPTS, PoolingParams(normalize=False), pooling_task="embed")]
    )
    with LLM(tiny_model, task="embed", hf_overrides={"is_matryoshka": True}, **SMALL) as llm:
        cut = vectors(llm, PROMPTS, pooling_params=PoolingParams(dimensions=10))
    expected = whole[:, :10] / np.linalg.norm(whole[:, :10], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-6)


def test_saved_models_pool_as_before(minilm: Path, tmp_path: Path) -> None:
    small = {"max_num_seqs": 2, "max_model_len": 32, "enforce_eager": True}
    with LLM(minilm, **small) as llm:
        before = vectors(llm, PROMPTS[:2])
        llm.save(tmp_path / "saved")
    with LLM(tmp_path / "saved", **small) as llm:
        np.testing.assert_array_equal(vectors(llm, PROMPTS[:2]), before)


def fail_elsewhere(llm: LLM) -> None:
    """A step that another thread runs, and whose error that thread gets."""

    def fail() -> None:
        raise OSError("the device is gone")

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(OSError):
        patch.setattr(llm.engine.core, "step", fail)
        EngineClient.step(llm.engine.client)


def test_tensors_of_a_model_that_generates_replace_weights(pooling: LLM, tiny_model: Path, tmp_path: Path) -> None:
    """Whose head is passed over, as it is in a checkpoint."""
    own, other = (load_file(path / "model.safetensors") for path in (tiny_model, write_tiny_model(tmp_path, seed=1)))
    assert "lm_head.weight" in own
    before = vectors(pooling, PROMPTS)
    pooling.update_weights(other)
    assert np.abs(vectors(pooling, PROMPTS) - before).max() > 0.1
    pooling.update_weights(own)
    np.testing.assert_array_equal(vectors(pooling, PROMPTS), before)


@pytest.mark.parametrize("on_error", ["raise", "return"])
@pytest.mark.parametrize(
    ("interrupt", "words"),
    [
        (lambda llm: llm.engine.client.abort_all(), "aborted"),
        (LLM.sleep, "aborted"),
        (fail_elsewhere, "the device is gone"),
    ],
    ids=["abort", "sleep", "failure"],
)
def test_what_others_do_to_the_engine_is_told(
    pooling: LLM, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[LLM], None], words: str, on_error: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pooling.engine.client, "step", lambda: interrupt(pooling))
        if on_error == "raise":
            with pytest.raises(RuntimeError, match=words):
                pooling.embed(PROMPTS, use_tqdm=False)
        else:
            outputs = pooling.embed(PROMPTS, use_tqdm=False, on_error="return")
            assert [words in (output.error or "") for output in outputs] == [True] * len(PROMPTS)
    pooling.wake_up()
    assert vectors(pooling, PROMPTS).shape == (len(PROMPTS), 64)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_late_chunks_are_means_over_a_text_that_was_read_as_a_whole(pooling: LLM) -> None:
    texts = ["Bär: " + "a text of several steps. " * 4, "short"]
    states = pooling.encode(texts, PoolingParams(use_activation=False), pooling_task="token_embed", use_tqdm=False)
    for size in (1, 7, 1000):
        params = PoolingParams(late_chunking_params=LateChunkingParams(size))
        outputs = pooling.encode(texts, params, pooling_task="token_embed", use_tqdm=False)
        for text, whole, output in zip(texts, states, outputs, strict=True):
            tokens = whole.outputs.data
            parts = [tokens[first : first + size].mean(axis=0) for first in range(0, len(tokens), size)]
            np.testing.assert_allclose(output.outputs.data, unit(np.array(parts)), atol=1e-5)
            found = output.late_chunking
            assert found is not None and (found.chunk_size, found.input_tokens) == (size, len(tokens))
            assert len(found.chunks) == len(output.outputs.data)
            spans = [chunk.char_range for chunk in found.chunks]
            assert all(span is not None for span in spans)
            if size == 7:  # the second character is two tokens, each a byte
                assert text[slice(*(spans[0] or ()))] == ("Bär: a" if "ä" in text else text)
    (plain,) = pooling.encode(texts[1], pooling_task="token_embed", use_tqdm=False)
    assert plain.late_chunking is None and plain.outputs.data.shape == (5, 64)
    # one each
    mixed = [PoolingParams(late_chunking_params=LateChunkingParams(2)), PoolingParams()]
    outputs = pooling.encode([texts[1]] * 2, mixed, pooling_task="token_embed", use_tqdm=False)
    assert [len(output.outputs.data) for output in outputs] == [3, 5]


def test_what_cannot_be_chunked_is_refused(pooling: LLM) -> None:
    params = PoolingParams(late_chunking_params=LateChunkingParams(4))
    with pytest.raises(ValueError, match="requires token_embed"):
        pooling.embed("x", pooling_params=params, use_tqdm=False)
    for prompt in ([1, 2, 3], {"prompt_token_ids": [1, 2], "prompt": "other"}):
        with pytest.raises(ValueError, match="plain-text input"):
            pooling.encode(prompt, params, pooling_task="token_embed", use_tqdm=False)
    with pytest.raises(ValueError, match="does not support input truncation"):
        pooling.encode("x", params, pooling_task="token_embed", truncate_prompt_tokens=3, use_tqdm=False)
    for size in (0, True, 2.0, 2**63):
        with pytest.raises(ValueError, match="chunk_size must be a positive integer"):
            LateChunkingParams(size)  # pyright: ignore[reportArgumentType]


def test_an_engine_for_token_embeddings_embeds_and_scores_by_token(tiny_model: Path) -> None:
    """As vLLM's examples of several vectors a text ask for it."""
    with LLM(tiny_model, runner="pooling", pooler_config=PoolerConfig(task="token_embed"), **SMALL) as llm:
        query, *documents = (output.outputs.data for output in llm.embed(PROMPTS, use_tqdm=False))  # pyright: ignore
        assert query.shape == (3, 64)
        scores = [output.outputs.score for output in llm.score(PROMPTS[0], PROMPTS[1:], use_tqdm=False)]
    np.testing.assert_allclose(scores, [(query @ d.T).max(axis=1).sum() for d in documents], rtol=1e-5)
