"""One of several processes that run an engine together, each with two virtual devices.

``python -m support.several_hosts FOLDER ADDRESS PROCESSES NUMBER`` prints one JSON object: what the engine answered.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
from support.tensor_parallel import ARGUMENTS, GREEDY, PROMPTS, SEEDED, answers, generate, tokens

from jaxllm import LLM, AsyncLLM
from jaxllm.api.errors import JaxLLMError
from jaxllm.config.parallel import Grid
from jaxllm.parallel.processes import engine_devices
from jaxllm.speculative import adaptive

#: of tokens that came before
DRAFTS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 1}


def refused(call: Any) -> str:
    try:
        call()
    except JaxLLMError as error:
        return str(error)
    return ""


def others(number: int) -> list[Any]:
    """Calls that differ from process to process: by a prompt, by a parameter, by how many prompts there are, also where
    these are read as they come.
    """
    prompt = f"of process {number}"
    return [
        ([PROMPTS[0], prompt], GREEDY),
        ([PROMPTS[0]] * 2, [GREEDY, dataclasses.replace(GREEDY, max_tokens=number + 1)]),
        (PROMPTS[: number + 1], GREEDY),
        ((text for text in PROMPTS[: number + 1]), GREEDY),
    ]


def together(folder: Path, number: int) -> dict[str, Any]:
    """What an engine over the devices of all processes answers, and what it refuses."""
    found: dict[str, Any] = {}
    with LLM(folder, tensor_parallel_size=4, **ARGUMENTS) as llm:
        found |= answers(llm)
        # what has no length is read in step, too
        found["streamed"] = tokens(generate(llm, (prompt for prompt in PROMPTS), GREEDY))
        llm.sleep(2)
        llm.wake_up()
        found["read again"] = tokens(generate(llm, PROMPTS, GREEDY))
        [params] = llm.apply_model(lambda params: params)
        found["held"] = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
        found["planned"] = llm.memory_plan.weight_bytes
        found["blocks"] = llm.memory_plan.num_blocks
        found["explained"] = str(llm.explain())
        found["differ"] = [refused(lambda prompts=prompts: generate(llm, *prompts)) for prompts in others(number)]
        found["went on"] = tokens(generate(llm, PROMPTS, GREEDY))
        stepped = llm.llm_engine
        found["differ"].append(refused(lambda: stepped.add_request(str(number), PROMPTS[0], GREEDY)))
        found["no save"] = refused(lambda: llm.save(folder / "saved"))
        found["no sleep"] = refused(lambda: llm.sleep(1))
    found["drafted"] = drafted(folder)
    found["no async"] = refused(lambda: asyncio.run(AsyncLLM.start(folder, tensor_parallel_size=4, **ARGUMENTS)))
    found["no three"] = refused(lambda: engine_devices("cpu", Grid(tensor=3)))
    found["no stages"] = refused(lambda: LLM(folder, tensor_parallel_size=2, pipeline_parallel_size=2, **ARGUMENTS))
    return found


def drafted(folder: Path) -> dict[str, Any]:
    """What the same engine answers that drafts as well, and how many drafts were right."""
    # whatever is drafted is checked
    adaptive.CPU_CHECK = adaptive.CPU_ROWS = adaptive.CPU_FEW_ROWS = 0.0
    drafts = {**ARGUMENTS, "enforce_eager": False, "max_num_seqs": 2, "speculative_config": DRAFTS}
    with LLM(folder, tensor_parallel_size=4, **drafts) as llm:
        values = {
            name: tokens(generate(llm, PROMPTS, params)) for name, params in (("greedy", GREEDY), ("seeded", SEEDED))
        }
        right = [one.value for one in llm.get_metrics() if one.name == "vllm:spec_decode_num_accepted_tokens"]  # pyright: ignore
        return {**values, "right": sum(right)}


def main() -> None:
    folder, address, processes, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    jax.config.update("jax_num_cpu_devices", 2)  # pyright: ignore[reportAttributeAccessIssue]
    jax.distributed.initialize(address, num_processes=processes, process_id=number)
    found: dict[str, Any] = {"together": together(folder, number)}
    found["alone"] = [device.process_index for device in engine_devices("cpu", Grid(tensor=2))]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
