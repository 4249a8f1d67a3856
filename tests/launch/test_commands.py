"""What each command gives a person: the numbers of the run, reproducible text, a page that stands
alone."""

import ast
import html.parser
import json
import os
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train.tiny_run import ROOT, command, environment, records, run

from launch.__main__ import commands
from mor_jax.model.lm import CAUSAL
from mor_jax.train.load import load_model

COMMANDS = list(commands())
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def generate(trained, *args):
    done = run("generate", "--checkpoint", trained.mor, *args)
    assert done.returncode == 0, done.stderr
    return done


def test_evaluate_repeats_the_evaluation_of_the_run(trained, tmp_path):
    out = tmp_path / "record.json"
    done = run("evaluate", "--checkpoint", trained.mor, "--out", out)
    assert done.returncode == 0, done.stderr
    written, last = json.loads(out.read_text()), records(trained.mor, "eval")[-1]
    assert written.pop("step") == last.pop("step") == 120
    del last["kind"]
    assert written.keys() == last.keys()
    for name, value in last.items():
        np.testing.assert_allclose(written[name], value, atol=1e-6, rtol=1e-6, err_msg=name)
    for mode in ("causal", "topk"):
        assert f"{last[f'{mode}/nll']:.3f}" in done.stdout
    assert "causal" in done.stdout and "top-k" in done.stdout


def test_evaluate_on_other_text_and_an_earlier_step(trained, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text("value = depth + loss\n" * 9)
    out = tmp_path / "record.json"
    done = run(
        "evaluate",
        "--checkpoint",
        trained.mor / "checkpoints",
        "--step",
        80,
        "--paths",
        text,
        "--weights",
        "int8",
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    cost = record["int8"]["causal/nll"] - record["causal/nll"]
    assert f"int8 weights cost {cost:+.5f} nats / token" in done.stdout
    assert 0 < abs(cost) < 0.05 * record["causal/nll"]
    assert record["step"] == 80 and record["bytes"] <= len(text.read_bytes())
    # all of it but the first byte of each row
    assert record["bytes"] > 0.9 * len(text.read_bytes())
    assert record["causal/nll"] > 0


def test_generate_is_a_function_of_the_seed(trained):
    args = ("--prompt", "def ", "--max_tokens", 20, "--temperature", 1.0)
    first, again = generate(trained, *args, "--seed", 3), generate(trained, *args, "--seed", 3)
    other = generate(trained, *args, "--seed", 4)
    assert first.stdout == again.stdout and first.stdout.startswith("def ")
    assert len(first.stdout) > len("def \n")
    assert first.stdout != other.stdout
    assert "\x1b" not in first.stdout


def test_generate_streams_and_reads_its_prompt_from_stdin(trained):
    process = subprocess.Popen(
        command("generate", "--checkpoint", trained.mor, "--max_tokens", 25, "--temperature", 0.9),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=environment(),
    )
    process.stdin.write("é = ".encode())
    process.stdin.close()
    chunks = []
    while chunk := os.read(process.stdout.fileno(), 1 << 16):
        chunks.append(chunk)
    assert process.wait() == 0
    assert b"".join(chunks).decode().startswith("é = ")
    assert len(chunks) >= 3  # text came as it was made


def test_greedy_text_is_the_argmax_of_full_forward_passes(trained):
    """The cache, the command and the decoder change nothing: every token is the causal model's own
    first choice."""
    prompt, count = "return loss", 16
    model = load_model(trained.mor)
    tokenizer = model.tokenizer
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    with jax.set_mesh(model.mesh):
        forward = jax.jit(lambda p, t, s: model.lm.apply(p, t, s, mode=CAUSAL))
        for _ in range(count):
            row = np.zeros((1, model.lm.model.context), np.int32)
            row[0, : len(ids)] = ids
            seg = jnp.asarray(np.arange(row.shape[1])[None] < len(ids), jnp.int32)
            logits = forward(model.params, jnp.asarray(row), seg)[
                0, len(ids) - 1, : tokenizer.vocab_size
            ]
            ids.append(int(np.argmax(logits)))
            if ids[-1] == tokenizer.eos:
                break
    done = generate(trained, "--prompt", prompt, "--max_tokens", count, "--temperature", 0)
    assert done.stdout == tokenizer.decode(ids) + "\n"


def test_show_depth_colours_and_changes_no_text(trained):
    args = ("--prompt", "def ", "--max_tokens", 12, "--seed", 1)
    plain, coloured = (
        generate(trained, *args).stdout,
        generate(trained, *args, "--show_depth").stdout,
    )
    assert ANSI.search(coloured)
    text, legend = ANSI.sub("", coloured).rstrip("\n").rsplit("\n", 1)
    assert text + "\n" == plain
    assert legend.split() == ["depth", "0", "1", "2", "3"]


def test_depth_curve_writes_table_numbers_and_picture(trained, tmp_path):
    out = tmp_path / "new" / "curve.v1"
    done = run("depth_curve", "--checkpoint", trained.mor, "--points", 3, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "surveying" not in done.stderr.lower()  # the checkpoint carries its survey
    record = json.loads(out.with_name("curve.v1.json").read_text())
    assert out.with_name("curve.v1.png").read_bytes()[1:4] == b"PNG"
    assert [p["asked"] for p in record["dial"]] == [1.0, 2.0, 3.0]
    assert [p["max_depth"] for p in record["cap"]] == [1, 2, 3]
    last = records(trained.mor, "eval")[-1]
    for point in (record["as_configured"], record["cap"][-1]):  # a cap of R is no cap
        assert point["nll"] == pytest.approx(last["causal/nll"], rel=1e-6)
    for point in record["cap"]:
        assert sum(point["depth_share"][point["max_depth"] + 1 :]) == 0
    assert [p["mean_depth"] for p in (record["dial"][0], record["dial"][2])] == [1.0, 3.0]
    for asked in ("as configured", "mean 2", "at most 1"):
        assert asked in done.stdout


def test_generate_at_a_chosen_depth(trained):
    args = ("--prompt", "def ", "--max_tokens", 6, "--show_depth")
    one = generate(trained, *args, "--mean_depth", 1.0, "--max_depth", 1).stdout
    three = generate(trained, *args, "--min_depth", 3).stdout
    colours = [set(ANSI.findall(text.rstrip("\n").rsplit("\n", 1)[0])) for text in (one, three)]
    assert colours[0] and colours[1] and not (colours[0] & colours[1]) - {"\x1b[0m"}


class Links(html.parser.HTMLParser):
    """Everything a page would fetch, and its text."""

    def __init__(self):
        super().__init__()
        self.fetched, self.text = [], []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster") or (name == "href" and tag == "link"):
                self.fetched.append(value)

    def handle_data(self, data):
        self.text.append(data)


def test_report_is_one_page_about_both_runs(trained, tmp_path):
    out = tmp_path / "page" / "report.html"
    done = run("report", trained.mor, trained.vanilla, "--out", out)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    assert "mor" in done.stdout and "vanilla" in done.stdout  # the table
    page = out.read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert [v for v in links.fetched if not v.startswith("data:")] == []
    assert not re.search(r"@import|url\(\s*['\"]?(?!data:|#)", page)
    text = " ".join(links.text)
    assert "vanilla" in text and "mor" in text
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_docstring(name):
    done = run(name, "--help")
    assert done.returncode in (0, 1), done.stderr
    source = Path(ROOT / "launch" / f"{name}.py").read_text(encoding="utf-8")
    for line in ast.get_docstring(ast.parse(source)).splitlines():
        assert line.strip() in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (("--recursions", 5), "only a model of depth policy 'fixed'"),
        (("--exit", "latent"), "goes with config.depth.policy = 'fixed'"),
    ],
)
def test_depth_by_hand_is_refused_to_a_routed_model(trained, flag, message):
    done = run("generate", "--checkpoint", trained.mor, "--prompt", "def", *flag)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
