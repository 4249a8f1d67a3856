"""The command that serves: ready when it says so, an answer, a stop in order; and one line for a
mistake."""

import json
import re
import signal
import subprocess
import threading
import urllib.request

import pytest
from train.tiny_run import ROOT, command, environment, run


def test_it_serves_until_it_is_told_to_stop(trained):
    process = subprocess.Popen(
        command("serve", f"tiny={trained.mor}", "--port", 0, "--engine", "plain"),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    watch = threading.Timer(240, process.kill)
    watch.start()
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("ready"):
                break
        port = re.search(r"listening at http://127\.0\.0\.1:(\d+)/v1", said[0])[1]
        assert re.search(r"tiny: loaded in [\d.]+ s, warmed up in [\d.]+ s", "".join(said))
        assert re.search(r"ready: tiny at .* \(no key needed\), [\d.]+ s after the start", said[-1])
        body = json.dumps(
            {"model": "tiny", "prompt": "def", "max_tokens": 4, "ignore_eos": True}
        ).encode()
        ask = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(ask, timeout=120) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "SIGTERM" in process.stderr.read()
    finally:
        watch.cancel()
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["runs/nowhere"], ["runs/nowhere"]),
        (["x", "--host", "0.0.0.0"], ["0.0.0.0", "--api_key_file"]),
    ],
)
def test_a_mistake_is_one_line(args, words):
    done = run("serve", *args, "--port", 0)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), done.stderr
