"""The engine driven from outside, step by step."""

from __future__ import annotations

import pytest

from jaxllm import LLM, LLMEngine, RequestOutput, RequestOutputKind, SamplingParams
from jaxllm.errors import ValidationError
from jaxllm.runner.runner import StepResult

PROMPTS = ["one", "and another", "a third prompt"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture
def stepped(engine: LLM) -> LLMEngine:
    return engine.llm_engine


def drive(engine: LLMEngine) -> list[RequestOutput]:
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


def test_requests_come_while_others_run(engine: LLM, stepped: LLMEngine):
    expected = [output.outputs[0].text for output in engine.generate(PROMPTS, GREEDY, use_tqdm=False)]
    outputs, waiting = [], dict(enumerate(PROMPTS))
    while waiting or stepped.has_unfinished_requests():
        if waiting:
            index = min(waiting)
            stepped.add_request(str(index), waiting.pop(index), GREEDY)
        outputs += stepped.step()
    last = {output.request_id: output for output in outputs if output.finished}
    assert [last[str(i)].outputs[0].text for i in range(3)] == expected
    assert len(outputs) > 3, "outputs come before the end"
    assert stepped.get_num_unfinished_requests() == 0


def test_output_kinds(stepped: LLMEngine):
    counts, texts = {}, {}
    for kind in RequestOutputKind:
        params = SamplingParams(temperature=0.0, max_tokens=8, output_kind=kind)
        stepped.add_request(kind.name, PROMPTS[0], params)
        outputs = drive(stepped)
        counts[kind] = len(outputs)
        texts[kind] = outputs[-1].outputs[0].text
        if kind is RequestOutputKind.DELTA:
            texts[kind] = "".join(output.outputs[0].text for output in outputs)
    assert set(counts.values()) == {1, 8} and counts[RequestOutputKind.FINAL_ONLY] == 1
    assert len(set(texts.values())) == 1


def test_aborted_requests_bring_nothing_more(stepped: LLMEngine):
    for name in ("kept", "ended"):
        stepped.add_request(name, PROMPTS[0], GREEDY)
    with pytest.raises(ValidationError, match="'kept' is in use"):
        stepped.add_request("kept", PROMPTS[1], GREEDY)
    stepped.abort_request("ended")
    assert stepped.get_num_unfinished_requests() == 1
    assert {output.request_id for output in drive(stepped)} == {"kept"}


def test_running_requests_survive_a_reset(engine: LLM, stepped: LLMEngine):
    expected = engine.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].outputs[0].text
    stepped.add_request("x", PROMPTS[0], GREEDY)
    for _ in range(4):
        stepped.step()
    assert stepped.reset_prefix_cache(reset_running_requests=True)
    assert drive(stepped)[-1].outputs[0].text == expected


def test_an_error_while_the_rest_is_read_is_told_to_who_waits(stepped: LLMEngine, monkeypatch: pytest.MonkeyPatch):
    def fail(self: StepResult) -> None:
        raise OSError("the device is gone")

    stepped.add_request("x", PROMPTS[0], GREEDY)
    for _ in range(3):
        stepped.step()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the device is gone"):
        patch.setattr(StepResult, "result", fail)
        stepped.reset_prefix_cache(reset_running_requests=True)
    (output,) = stepped.step()
    assert output.finished and "the device is gone" in (output.error or "")
    assert not stepped.has_unfinished_requests()


def test_a_step_of_a_sleeping_engine_ends_nothing(engine: LLM, stepped: LLMEngine):
    expected = engine.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].outputs[0].text
    stepped.add_request("x", PROMPTS[0], GREEDY)
    stepped.step()
    stepped.sleep(mode="keep")
    stepped.step()  # what the pause has brought
    with pytest.raises(RuntimeError, match="wake_up"):
        stepped.step()
    assert stepped.wake_up()
    assert drive(stepped)[-1].outputs[0].text == expected
