"""What an engine's process takes at most: what the plan says, and little more. In processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.quick_compile import THOROUGH, flags

REPOSITORY = Path(__file__).parents[2]
#: Gemma 3 270M with fewer layers: most of it is the embedding
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
    "eos_token_id": 1,
}
#: what the interpreter, the libraries and the compiler may take
OTHERS = 400_000_000
SCRIPT = """
import sys
from pathlib import Path
from jaxllm import LLM, SamplingParams

arguments = dict(max_model_len=1024, max_num_seqs=1, max_num_batched_tokens=8, kv_cache_memory_bytes=2**24)
with LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True, dtype=sys.argv[2], **arguments) as llm:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    llm.generate([{"prompt_token_ids": list(range(5, 15))}], params, use_tqdm=False)
    plan = llm.memory_plan
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
print(peak, plan.weight_bytes + plan.state_bytes + plan.kv_cache_bytes + plan.activation_bytes)
"""


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the process's memory from /proc")
@pytest.mark.parametrize("dtype", ["float32"])
def test_a_process_takes_what_is_planned_and_the_compilers_memory(tmp_path: Path, dtype: str):
    """At a start that compiles, and at one that finds its programs."""
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    for start in ("cold", "warm"):
        peak, planned = run(tmp_path, dtype)
        print(f"{dtype}, {start}: planned {planned / 1e6:.0f} MB, at most {peak / 1e6:.0f} MB")
        assert peak < planned + OTHERS


def run(folder: Path, dtype: str) -> tuple[int, int]:
    """The peak of a process that makes an engine and generates, and what the engine's plan says, in bytes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    # what compiling takes is a user's too
    kept["XLA_FLAGS"] = flags(THOROUGH, kept["XLA_FLAGS"])
    own = {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "JAXLLM_CACHE": str(folder / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), dtype],
        env={**kept, **own},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    peak, planned = map(int, result.stdout.split())
    return peak, planned
