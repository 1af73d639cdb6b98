"""The README's Python works as pasted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_python_works_as_pasted(smollm2_gguf: Path, minilm: Path, tmp_path: Path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
    script = tmp_path / "pasted.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(README.parent)}
    result = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "vllm:prefix_cache_hits" in result.stdout and "vllm:num_preemptions" in result.stdout


def test_the_readme_opens_with_the_two_commands():
    code = re.findall(r"```\n(.*?)```", README.read_text(), re.DOTALL)[0]
    assert [line.split("#")[0].strip() for line in code.splitlines()] == ["make demo", "make test"]
