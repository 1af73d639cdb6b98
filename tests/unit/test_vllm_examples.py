"""vLLM's examples were run, as `vllm_examples` says, and what a run shows is read rightly."""

from __future__ import annotations

import json

import pytest
from vllm_examples.__main__ import RESULTS, ROADS, table
from vllm_examples.examples import EXAMPLES
from vllm_examples.outcome import outcome, renamed


def test_most_examples_run_both_ways():
    results = json.loads(RESULTS.read_text())
    assert list(results) == [example.path for example in EXAMPLES]
    assert all(set(found) == set(ROADS) for found in results.values())
    assert sum(set(found.values()) == {"ok"} for found in results.values()) >= 22
    assert table(results).endswith("run both ways.")


@pytest.mark.parametrize(
    ("returncode", "stderr", "expected"),
    [
        (0, "a warning", "ok"),
        (None, "", "failed: it did not end in time"),
        (1, "Traceback:\nKeyError: 'x'\n", "failed: KeyError: 'x'"),
        (-6, "", "failed: exit status -6"),
        (
            1,
            "Traceback:\nModuleNotFoundError: jaxllm has no vllm.assets.image; it takes none\n",
            "refused: ModuleNotFoundError: jaxllm has no vllm.assets.image; it takes none",
        ),
        (
            1,
            "jaxllm.api.errors.ValidationError: enable_lora=True is not supported yet\nnote\n",
            "refused: jaxllm.api.errors.ValidationError: enable_lora=True is not supported yet",
        ),
    ],
)
def test_outcomes(returncode: int | None, stderr: str, expected: str):
    assert outcome(returncode, stderr) == expected


def test_only_imports_are_renamed():
    script = (
        "import vllm.envs\nfrom vllm import LLM\n    from vllm.config import X\nprint('vllm', vllm_config)\n"
        "import vllmx\n"
    )
    assert renamed(script) == (
        "import jaxllm.envs\nfrom jaxllm import LLM\n    from jaxllm.config import X\nprint('vllm', vllm_config)\n"
        "import vllmx\n"
    )
