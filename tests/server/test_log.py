import json
import logging

import pytest

from server.log import HumanFormatter, JsonFormatter
from tests.server.conftest import Serve

HOSTILE = "a\nERROR forged\r\x1b[31mred\u2028\x00"


def record(message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("server.x", logging.INFO, "x.py", 1, message, arguments, None)


@pytest.mark.parametrize("formatter", [HumanFormatter(), JsonFormatter()])
def test_a_message_is_one_line_whatever_is_in_it(formatter: logging.Formatter) -> None:
    line = formatter.format(record("model=%s", HOSTILE))

    assert len(line.splitlines()) == 1
    assert "\x1b" not in line


def test_json_lines_have_the_message_as_it_was() -> None:
    entry = json.loads(JsonFormatter().format(record("model=%s", HOSTILE)))

    assert entry["message"] == f"model={HOSTILE}"
    assert entry["level"] == "info"


def test_the_log_has_ids_and_counts_and_neither_prompts_nor_completions(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with serve() as (client, _):
        for body in ({"prompt": "secret"}, {"prompt": "secret", "temperature": 9}):
            client.post(
                "/v1/completions",
                json={"model": "tiny", "request_id": "req-1", **body},
            )
        client.post("/v1/completions", json={"model": "secret", "prompt": "secret"})

    ours = [r.getMessage() for r in caplog.records if r.name.startswith("server.")]
    assert len(ours) == 3
    assert "id=req-1 reason=length prompt_tokens=6 completion_tokens=16" in ours[0]
    assert "status=400" in ours[1]
    assert not any("secret" in line or "abcdef" in line for line in ours)
