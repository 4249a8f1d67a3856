"""What docs/serving.md shows runs as printed, and what it says of metrics and routes is so."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)


def test_snippets(server, capsys):
    (code,) = (text for language, text in BLOCKS if language == "python")
    code = code.replace("http://127.0.0.1:8000/v1", server.url).replace('"mor"', '"small"')
    code = code.replace('model_extra["small"]', 'model_extra["mor"]')
    exec(compile(code, "docs/serving.md", "exec"), {})
    out = capsys.readouterr().out
    assert "\n4\n" in out and re.search(r"\[[01, ]+\] [01]\.", out)


def test_metrics_named_are_those_there_are(server):
    server.complete(max_tokens=1)
    text = server.request("GET", "/metrics")[2].decode()
    section = PAGE[PAGE.index("## Metrics") : PAGE.index("## Evaluation")]
    there = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    assert set(re.findall(r"`((?:vllm|mor_jax):\w+)", section)) == there and len(there) > 30


def test_routes_named_are_there(server):
    paths = server.request("GET", "/openapi.json")[2].decode()
    section = PAGE[PAGE.index("| route | |") : PAGE.index("Both endpoints take")]
    for path in re.findall(r"`(?:GET |POST )?(/[\w./]+)", section):
        assert f'"{path}"' in paths or path in ("/openapi.json", "/v1/models/"), path


def test_flags_named_are_there():
    source = (Path(__file__).parents[2] / "launch" / "serve.py").read_text(encoding="utf-8")
    section = PAGE[PAGE.index("| flag | default") : PAGE.index("## Requests")]
    for flag in re.findall(r"--(\w+)", section):
        assert f'"{flag}"' in source, flag
