"""What IPython keeps of engines: not their memory."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from support.tiny_model import SMALL

from jaxllm import LLM
from jaxllm.engine.engine import Engine

#: bytes of a cache that would be seen if it were kept
CACHE = 300_000_000
CELLS = """
import json, resource, sys
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()

def run(cell):
    result = shell.run_cell(cell, store_history=True)
    assert result.success, result

# an engine that needs no device
make = f"LLM({sys.argv[1]!r}, load_format='null', skip_tokenizer_init=True, max_num_seqs=2)"
run("from jaxllm import LLM, SamplingParams\\nfrom jaxllm.engine.engine import Engine")
counts = []
for _ in range(3):
    run(f"llm = {make}\\nllm")
    counts.append(len(shell.user_ns["Engine"].running()))
run("same = repr(Out[4]) == repr(_4) == repr(llm)")
run("tasks = Out[4].supported_tasks")
run(f"other = {make}; (3, 4)")
run("other")
run("three = _, __, ___")
run("del llm")
run("after = len(Engine.running())")
run(make)
run("unnamed = len(Engine.running()) - after")
run("message = None\\ntry:\\n    Out[12].generate\\nexcept AttributeError as error:\\n    message = str(error)")

# the same cell again and again, with an engine that has a device's memory
real = f"LLM({sys.argv[1]!r}, skip_tokenizer_init=True, kv_cache_memory_bytes={CACHE}, **{json.loads(sys.argv[2])})"
run("del other")
run(f"held = {make}\\nheld.llm_engine.model_executor")
run("before = len(Engine.running())\\ndel held")
run("inside = before - len(Engine.running())")
megabytes = []
for _ in range(3):
    run(f"llm = {real}\\nllm.generate([[1, 2]], use_tqdm=False)\\nllm")
    pages = int(open("/proc/self/statm").read().split()[1])
    megabytes.append(pages * resource.getpagesize() // 10**6)
names = ("same", "tasks", "after", "unnamed", "message", "inside")
print(json.dumps([counts, megabytes, {name: shell.user_ns[name] for name in names}]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads the process's memory from /proc")
def test_out_keeps_no_engine(tiny_model: Path, tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "IPYTHONDIR": str(tmp_path)}
    command = [sys.executable, "-c", f"CACHE = {CACHE}\n{CELLS}", str(tiny_model), json.dumps(SMALL)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    *shown, last = done.stdout.strip().splitlines()
    counts, megabytes, found = json.loads(last)
    assert counts == [1, 1, 1], "one engine, however often the cell has run"
    assert found["same"] and found["tasks"] == ["generate"]
    assert found["after"] == 1 and found["unnamed"] == 0
    assert found["inside"] == 1, "nor does what vLLM's scripts reach through"
    assert "the engine has been freed" in found["message"] and "llm = LLM(...)" in found["message"]
    assert sum("LLM(" in line and "max_num_seqs=2" in line for line in shown) == 5
    assert megabytes[2] - megabytes[0] < CACHE / 10**6 / 2, megabytes
    assert done.stderr.count("The engine that this cell showed had no name, and is freed") == 1


def test_a_start_tells_of_the_engines_that_there_are(tiny_model: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "jaxllm")

    def told() -> list[str]:
        texts = [record.getMessage() for record in caplog.records if "To end one" in record.getMessage()]
        caplog.clear()
        return texts

    gc.collect()
    others = len(Engine.running())
    with LLM(tiny_model, **SMALL) as llm:
        told()
        plan, held = llm.memory_plan, llm.engine.runner.num_bytes
        assert plan.weight_bytes + plan.kv_cache_bytes <= held <= plan.used_bytes
        with LLM(tiny_model, load_format="null", max_num_seqs=2):
            (text,) = told()
        assert ("an engine that holds" in text or f"{others + 1} engines that hold" in text) and str(tiny_model) in text
    assert len(Engine.running()) == others
    dropped = LLM(tiny_model, load_format="null", max_num_seqs=2)
    engine = weakref.ref(dropped.engine)
    del dropped
    assert engine() is None and len(Engine.running()) == others
