"""What notebooks are given: well-formed, with every character of a text where it was, and nothing run that was text."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.api.outputs import CompletionOutput, Logprob, RequestOutput
from jaxllm.runner.memory.plan import MemoryPlan

OWN_TAGS = {"div", "span"}


class Page(HTMLParser):
    """The text of a page, the `title`s of its elements, its tags; tags have to close in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = ""
        self.titles: list[str] = []
        self.styles: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open.append(tag)
        assert {name for name, _ in attrs} <= {"style", "title"}
        self.titles += [value or "" for name, value in attrs if name == "title"]
        self.styles += [value or "" for name, value in attrs if name == "style"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError("a comment")

    def handle_decl(self, decl: str) -> None:
        raise AssertionError("a declaration")

    def handle_pi(self, data: str) -> None:
        raise AssertionError("a processing instruction")


def output(prompt: str | None, *completions: CompletionOutput, error: str | None = None) -> RequestOutput:
    return RequestOutput(
        request_id="a",
        prompt=prompt,
        prompt_token_ids=[1, 2],
        outputs=list(completions),
        finished=True,
        error=error,
    )


def readable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


TEXT = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="<>&\"'/!-;#x= scriptdv\n\ud800", max_size=40),
    st.sampled_from(["</div>", '"><script>alert(1)</script>', "<!-- ", "&lt;", "&#0;", "&amp", "]]>", "' onclick='"]),
)


@given(TEXT, TEXT, st.none() | TEXT)
def test_texts_come_out_as_they_were(prompt: str, text: str, error: str | None):
    page = Page(output(prompt, CompletionOutput(index=0, text=text, token_ids=[1]), error=error)._repr_html_())
    assert page.text == readable(prompt) + readable(text) + "1 tokens" + readable(error or "")
    assert page.tags <= OWN_TAGS and not page.titles


@given(st.lists(st.tuples(st.none() | TEXT, st.floats(max_value=0.0)), min_size=1, max_size=5))
def test_tokens_come_out_as_they_were(tokens: list[tuple[str | None, float]]):
    logprobs = [{i: Logprob(value, 1, text), -1: Logprob(-1.0, 2, text)} for i, (text, value) in enumerate(tokens)]
    ids = list(range(len(tokens)))
    page = Page(output(None, CompletionOutput(index=0, text="", token_ids=ids, logprobs=logprobs))._repr_html_())
    shown = "".join(f"[{i}]" if text is None else readable(text) for i, (text, _) in enumerate(tokens))
    assert page.text == "2 token ids" + shown + f"{len(tokens)} tokens"
    assert page.tags <= OWN_TAGS
    for title, (_, value) in zip(page.titles, tokens, strict=True):
        assert title.startswith(f"p={math.exp(value):.3f}, rank 1; ")


def test_unlikely_tokens_are_coloured():
    logprobs = [{7: Logprob(math.log(0.25), 2, "a"), 8: Logprob(math.log(0.5), 1, "b")}, {9: Logprob(0.0, 1, "c")}]
    completion = CompletionOutput(
        index=0,
        text="ac",
        token_ids=[7, 9],
        logprobs=logprobs,
        cumulative_logprob=math.log(0.25),
        finish_reason="stop",
        stop_reason="<end>",
    )
    page = Page(output("p", completion)._repr_html_())
    alphas = [float(a) for style in page.styles for a in re.findall(r"rgba\(230,159,0,([0-9.]+)\)", style)]
    assert alphas == [0.75, 0.0]
    assert page.titles == ["p=0.250, rank 2; 'b' 0.500, 'a' 0.250", "p=1.000, rank 1; 'c' 1.000"]
    assert page.text == "pac2 tokens · stop ('<end>') · cumulative logprob -1.386"


def test_many_tokens_and_completions():
    many = CompletionOutput(index=0, text="", token_ids=[1] * 2500, logprobs=[{1: Logprob(-0.1, 1, "x")}] * 2500)
    page = Page(output("p", many, CompletionOutput(index=1, text="y" * 30_000, token_ids=[2]))._repr_html_())
    assert page.text.count("x") == 2000 and "(500 more tokens)" in page.text
    assert page.text.count("y") == 20_000 and "(10000 more characters)" in page.text
    assert "completion 0 · 2500 tokens" in page.text and "completion 1 · 1 tokens" in page.text


PLAN = MemoryPlan(
    device='cpu "<0>"',
    platform="cpu",
    total_bytes=1000,
    gpu_memory_utilization=0.9,
    weight_bytes=400,
    activation_bytes=100,
    state_bytes=50,
    kv_cache_bytes=250,
    kv_cache_limit=None,
    num_blocks=11,
    block_size=16,
    max_model_len=80,
    max_num_seqs=4,
    max_num_batched_tokens=32,
    num_tokens=160,
    max_concurrency=2.0,
    kv_bytes_per_token=25,
)


@pytest.mark.parametrize(
    ("total", "widths"),
    [
        # of 640 pixels
        (1000, [256.0, 64.0, 32.0, 160.0, 128.0]),
        # a plan beyond the device, as num_gpu_blocks_override allows it: the parts fill the bar
        (500, [320.0, 80.0, 40.0, 200.0, 0.0]),
        (800, [320.0, 80.0, 40.0, 200.0, 0.0]),
    ],
)
def test_the_bar_of_a_memory_plan_is_in_proportion(total: int, widths: list[float]):
    source = dataclasses.replace(PLAN, total_bytes=total)._repr_html_()
    root = ElementTree.fromstring(source.replace("&#9632;", "#"))
    bars = list(root.iter("rect"))
    assert [float(bar.attrib["width"]) for bar in bars] == widths
    lefts = [float(bar.attrib["x"]) for bar in bars]
    assert lefts == pytest.approx([sum(widths[:i]) for i in range(5)], abs=0.02)
    assert [str(bar[0].text).split(":")[0] for bar in bars] == [
        "weights",
        "activations",
        "state",
        "KV cache",
        "not used",
    ]
    assert 'cpu "<0>"' in "".join(root.itertext())
