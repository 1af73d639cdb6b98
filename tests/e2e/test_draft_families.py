"""Whoever drafts, and whatever kind of model it is: tokens are those of plain greedy decoding in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.draft_families import DRAFTERS, FAMILIES, drafts_of, mixed_requests, write_family
from support.drafts import checks_that_cost, counted, results

from jaxllm import LLM

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "block_size": 8,
    "skip_tokenizer_init": True,
}
PAIRS = [(family, drafter) for family in FAMILIES for drafter in DRAFTERS] + [("DeepseekV3", "mtp")]
#: each drafter and each family at least once; `make test-peers` runs all pairs, and a real model
QUICK = [("Gemma2", "draft_model")]
THOROUGH = [
    *(("Llama", "suffix"), ("Mixtral", "eagle"), ("GptOss", "ngram")),
    *(("DeepseekV3", "eagle3"), ("DeepseekV3", "mtp")),
]
#: Blocks that hold one long sequence, not two: layers with windows beside others have blocks of their own.
POOLS = {"Gemma2": 24, "GptOss": 24}
Answers = Callable[[str], tuple[Path, list[Any]]]


def marks(*pair: str) -> list[pytest.MarkDecorator]:
    return [] if pair in QUICK else [pytest.mark.thorough] if pair in THOROUGH else [pytest.mark.large]


def requests(family: str) -> Any:
    return mixed_requests(8, 4, same=True) if family == "SmolLM2" else mixed_requests(40, 12)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Answers:
    """A family's model, and what it answers without drafts: asked once."""
    found: dict[str, tuple[Path, list[Any]]] = {}

    def answers(family: str) -> tuple[Path, list[Any]]:
        if family not in found:
            is_real = family == "SmolLM2"
            model = smollm2_gguf if is_real else write_family(tmp_path_factory.mktemp(family), family)
            with LLM(model, **ARGUMENTS, num_gpu_blocks_override=129, enforce_eager=True) as llm:
                found[family] = model, results(llm.generate(*requests(family), use_tqdm=False))
        return found[family]

    return answers


def assert_same(wanted: list[Any], model: Path, family: str, config: dict[str, Any]) -> None:
    with (
        LLM(model, **ARGUMENTS, num_gpu_blocks_override=POOLS.get(family, 17), speculative_config=config) as llm,
        # whatever is drafted is checked
        checks_that_cost(llm, 0.0),
    ):
        assert results(llm.generate(*requests(family), use_tqdm=False)) == wanted
        assert counted(llm, "num_accepted_tokens") > 30
        assert llm.engine.core.cores[0].scheduler.kv_cache_manager.pool.num_used == 0
        values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        # where all layers have windows, a sequence gives back the blocks behind them
        assert values["vllm:num_preemptions"] or family == "Mixtral"


@pytest.mark.parametrize(("family", "drafter"), [pytest.param(*pair, marks=marks(*pair)) for pair in PAIRS])
def test_tokens_are_those_without_drafts(plain: Answers, tmp_path: Path, tiny_model: Path, family: str, drafter: str):
    """200 mixed requests, with a pool that does not hold two long ones."""
    model, wanted = plain(family)
    assert_same(wanted, model, family, drafts_of(drafter, tmp_path, tiny_model, 64, 257))


@pytest.mark.large
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_real_models_tokens_are_those_without_drafts(plain: Answers, tmp_path: Path, drafter: str):
    model, wanted = plain("SmolLM2")
    assert_same(wanted, model, "SmolLM2", drafts_of(drafter, tmp_path, None, 576, 49152))
