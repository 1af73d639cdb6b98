"""The rows of a table are read as lines of a batch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.entrypoints.batch.lines import NumberedLine
from jaxllm.entrypoints.openai.requests import CHAT, COMPLETIONS, EMBEDDINGS
from jaxllm.entrypoints.tables import BadRow, as_messages, read_rows

ID_COLUMN = "custom_id"


def read_table(path: str, arguments: argparse.Namespace) -> Iterator[NumberedLine]:
    """Return the rows of a table, as `arguments` (prompt_column, messages_column, id_column, url, body) say.

    A row without an id is called after its number, row-1 being the first.
    """
    body = _shared_body(arguments.body)
    messages, prompt = arguments.messages_column, arguments.prompt_column
    if messages and prompt:
        raise ValidationError("Give --prompt-column or --messages-column, not both.")
    column = messages or prompt or "prompt"
    url = arguments.url or (CHAT if messages else COMPLETIONS)
    if messages and url != CHAT:
        raise ValidationError(f"--messages-column is for {CHAT}, and --url is {url}.")
    id_column = arguments.id_column or ID_COLUMN
    required = [column, id_column] if arguments.id_column else [column]
    rows = read_rows(path, required, [id_column], encoding=arguments.encoding)
    for number, row in enumerate(rows, start=1):
        if isinstance(row, BadRow):
            yield number, row
            continue
        custom_id = row.get(id_column)
        yield (
            number,
            {
                "custom_id": f"row-{number}" if custom_id is None else str(custom_id),
                "method": "POST",
                "url": url,
                "body": {**body, **_prompt(url, row[column], is_messages=bool(messages))},
            },
        )


def _prompt(url: str, value: Any, *, is_messages: bool) -> dict[str, Any]:
    if is_messages:
        return {"messages": as_messages(value)}
    if url == CHAT:
        return {"messages": [{"role": "user", "content": value}]}
    return {"input" if url == EMBEDDINGS else "prompt": value}


def _shared_body(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        body = json.loads(text)
    except ValueError as error:
        raise ValidationError(f"--body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValidationError(f"--body must be a JSON object such as '{{\"max_tokens\": 64}}', got {text!r:.80}")
    return body
