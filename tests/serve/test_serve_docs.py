"""What docs/serving.md shows runs as printed, and what it says of metrics and routes is so."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from mor_jax.parallel.processes import free_port

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)


def test_snippets(server, capsys):
    code = next(text for language, text in BLOCKS if language == "python")
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


def test_ray_serves_it(tmp_path):
    """By Ray's own program, on this machine, with the model that comes with the package."""
    (code,) = (text for language, text in BLOCKS if language == "python" and "ray" in text)
    (tmp_path / "ray_mor.py").write_text(code)
    port = free_port()
    (tmp_path / "run.py").write_text(RAY_PROGRAM)
    env = os.environ | {
        "MODEL": str(ROOT / "rlm_runtime" / "native"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HOME": str(tmp_path),  # where Ray keeps a token
    }
    with (tmp_path / "log").open("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "run.py", str(port)],
            cwd=tmp_path,
            env=env,
            stdout=log,
            stderr=log,
            stdin=subprocess.PIPE,
        )
        try:
            asked = {"model": "mor", "prompt": "def", "max_tokens": 4, "ignore_eos": True}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(asked).encode(),
                {"Content-Type": "application/json"},
            )
            end = time.monotonic() + 300
            while True:
                assert server.poll() is None and time.monotonic() < end, _tail(log)
                try:
                    with urllib.request.urlopen(request, timeout=60) as answer:
                        assert json.load(answer)["usage"]["completion_tokens"] == 4
                        return
                except urllib.error.URLError:
                    time.sleep(0.5)
        finally:
            server.stdin.close()
            server.wait(120)


RAY_PROGRAM = """
import sys
import ray, ray_mor
from ray import serve

ray.init(num_cpus=2, include_dashboard=False)
serve.start(http_options={"port": int(sys.argv[1])})
serve.run(ray_mor.app)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


def _tail(log):
    log.seek(0)
    return log.read()[-3000:]
