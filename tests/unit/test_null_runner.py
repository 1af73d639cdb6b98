"""The null model: the engine's own bookkeeping is real, and what comes out is a fixed cycle of ordinary tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_model import EOS, write_tiny_model

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.runner.null import ordinary_tokens
from jaxllm.tokenization.load import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    (folder / "model.safetensors").unlink()  # it is not read
    return folder


def test_outputs_are_ordinary_tokens_of_the_asked_length(model: Path, caplog: pytest.LogCaptureFixture):
    lengths = [1, 7, 40]
    with LLM(model, load_format="null", max_num_seqs=2) as llm:
        params = [SamplingParams(max_tokens=length) for length in lengths]
        outputs = llm.generate(["a" * 100, "b", "c"], params, use_tqdm=False)
        again = llm.generate(["a" * 100, "b", "c"], params, use_tqdm=False)
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        assert llm.memory_plan.weight_bytes == 0
        for use in (lambda: llm.save(model / "copy"), lambda: llm.apply_model(len), lambda: llm.update_weights({})):
            with pytest.raises(ValidationError, match="has no weights"):
                use()
        llm.sleep(level=1)
        assert llm.wake_up()
        with llm.trace() as trace:
            llm.generate("abc", SamplingParams(max_tokens=2), use_tqdm=False)
        assert len(trace.steps) == 2
    assert "outputs are meaningless" in caplog.text
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    for output, other in zip(outputs, again, strict=True):
        (completion,) = output.outputs
        assert completion.finish_reason == "length"
        assert EOS not in completion.token_ids
        assert completion.text.isascii() and completion.text.isprintable()
        assert len(completion.text) == len(completion.token_ids)  # the tokenizer's are bytes
        assert other.outputs[0].token_ids == completion.token_ids
    # the block manager works as ever: the second call finds the first one's blocks
    assert again[0].num_cached_tokens == 64
    assert getattr(metrics["vllm:generation_tokens"], "value") == 2 * sum(lengths)  # noqa: B009


def test_logprobs_and_stops(model: Path):
    with LLM(model, load_format="null") as llm:
        (plain,) = llm.generate("ab", SamplingParams(max_tokens=8), use_tqdm=False)
        stop = plain.outputs[0].text[3:5]
        (stopped,) = llm.generate("ab", SamplingParams(max_tokens=8, stop=stop, logprobs=3), use_tqdm=False)
    assert stopped.outputs[0].text == plain.outputs[0].text[:3]
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].logprobs is not None
    assert all(
        position[token_id].logprob == 0.0
        for token_id, position in zip(  # fmt: skip
            stopped.outputs[0].token_ids, stopped.outputs[0].logprobs, strict=True
        )
    )


def test_a_short_default_is_told_once_to_scripts_and_to_batches(model: Path, caplog: pytest.LogCaptureFixture):
    with LLM(model, load_format="null") as llm, caplog.at_level("INFO", logger="jaxllm"):
        for _ in range(2):
            list(llm.as_completed(["ab", "cd"], SamplingParams()))
    (told,) = [line for line in caplog.messages if "max_tokens" in line]
    assert "cut at 16 tokens" in told and "in SamplingParams, or in the bodies of a batch file" in told


def test_logprobs_of_prompts_and_of_chosen_tokens(model: Path):
    params = SamplingParams(max_tokens=3, prompt_logprobs=2, logprob_token_ids=[5, 200])
    with LLM(model, load_format="null", max_num_batched_tokens=16, max_num_seqs=2) as llm:
        (output,) = llm.generate("a" * 50, params, use_tqdm=False)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 50
    assert [len(position or {}) for position in output.prompt_logprobs] == [0] + [3] * 49
    (completion,) = output.outputs
    assert [set(p) for p in completion.logprobs or []] == [{token, 5, 200} for token in completion.token_ids]


def test_the_cache_has_the_blocks_that_were_asked_for(model: Path):
    """The plan counts blocks as for a real cache: 2 layers, keys and values of 2 heads of 16 in bfloat16."""
    with LLM(model, load_format="null", kv_cache_memory_bytes=2**24, block_size=16) as llm:
        assert llm.memory_plan.num_blocks == 2**24 // (2 * 2 * 16 * 16 * 2 * 2)
    with pytest.raises(ValidationError, match="needs 33 blocks of KV cache, and there are 5"):
        LLM(model, load_format="null", num_gpu_blocks_override=5, block_size=16)


def test_special_tokens_are_not_ordinary(smollm2_gguf: Path):
    """Of SmolLM2's seventeen special tokens, which come first, `all_special_ids` lists three."""
    tokenizer = load_tokenizer(smollm2_gguf)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert len(special) == 17 > len(tokenizer.all_special_ids)
    ids = ordinary_tokens(tokenizer, 1000, [])
    assert special.isdisjoint(ids)
    assert len(tokenizer.decode(ids, skip_special_tokens=True)) >= len(ids)
