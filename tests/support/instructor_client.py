"""instructor asks a server for an object: ``python tests/support/instructor_client.py URL`` prints what it makes of the
answers, as JSON, by its mode. It runs where instructor is installed, and jaxllm need not be.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any, Literal

import openai
import pydantic

instructor: Any = importlib.import_module("instructor")
MESSAGES: Any = [{"role": "user", "content": "What?"}]


class Weather(pydantic.BaseModel):
    """What the model has to fill in."""

    city: Literal["Paris", "Rome"]
    windy: bool


def main(url: str) -> None:
    found: dict[str, Any] = {}
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 60}
    for mode in ("TOOLS", "JSON_SCHEMA"):
        plain = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        client = instructor.from_openai(plain, mode=instructor.Mode[mode])
        whole = client.chat.completions.create(**asked, response_model=Weather, max_retries=0)
        assert isinstance(whole, Weather)
        *_, last = client.chat.completions.create_partial(**asked, response_model=Weather)
        found[mode] = [whole.model_dump(), last.model_dump()]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
