"""The benchmarks' own code, at toy sizes. No figure is judged: a busy machine proves nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# the benchmarks are part of the checkout, not of the installed packages
sys.path.insert(0, str(ROOT))

from benchmarks import rlm_cases, rlm_overhead  # noqa: E402
from benchmarks.rlm_run import Failed, run  # noqa: E402
from benchmarks.scripted_server import Served  # noqa: E402


def overhead(*arguments):
    command = [sys.executable, "-m", "benchmarks.rlm_overhead", "--quick", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_quick_run_prints_a_table_and_writes_a_record_of_all_that_was_measured(tmp_path):
    out = tmp_path / "result.json"
    names = "first_call,turns_few,text_file,batch,print,flood"
    done = overhead("--peers", "off", "--cases", names, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "first root call" in done.stdout
    result = json.loads(out.read_text())
    assert (
        result["benchmark"] == "rlm_overhead"
        and result["commit"]
        and result["device"]
        and result["time"]
    )
    assert result["versions"]["python"] and set(result["busy"]) == {"rounds", "once"}
    assert result["sandbox"]["seccomp"].startswith("active")
    found = result["runtimes"]["rlm_runtime"]
    assert set(found) == set(names.split(","))
    for case in found.values():
        assert all(len(values) == 1 for values in case["rounds"].values())
    assert (
        0 < found["first_call"]["median"]["import"] < found["first_call"]["median"]["to_first_call"]
    )
    assert (
        found["first_call"]["median"]["host_rss"]
        > 10e6
        < 10 * found["first_call"]["median"]["worker_rss"]
    )
    assert found["batch"]["median"]["took"] >= 0.05, "the server takes 50 ms for every sub-call"
    assert found["batch"]["median"]["at_once"] == rlm_cases.QUICK.batch
    assert found["flood"]["median"]["per_call"] > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--cases", "nonsense"), "nonsense is none of first_call"),
        (("--peers", "/no/python"), "/no/python"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_runs(arguments, told, tmp_path):
    done = overhead(*arguments, "--out", str(tmp_path / "result.json"))
    assert done.returncode == 2
    assert told in done.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_does_not_do_what_the_script_says_is_found_out(tmp_path):
    script = tmp_path / "idle.py"
    script.write_text(
        'import json\nprint(json.dumps({"answer": "42", "called": 0, "returned": 1}))\n'
    )
    idle = rlm_overhead.Driver("idle", sys.executable, script, "fenced")
    cases = {case.name: case for case in rlm_cases.cases(rlm_cases.QUICK)}
    contexts = rlm_cases.write_contexts(tmp_path, rlm_cases.QUICK, {"tiny"})
    with pytest.raises(Failed, match="0 root calls instead of 2; 0 sub-calls instead of 8"):
        run(cases["batch"], idle, contexts)


def test_targets_are_judged_by_the_medians_and_only_where_their_cases_were_measured():
    sizes = rlm_cases.Sizes()
    figures = {"first_call": {"to_first_call": 0.39}, "turns_many": {"per_turn": 0.0101}}
    judged = {v["what"]: v["reached"] for v in rlm_overhead.verdicts(figures, sizes)}
    assert judged == {
        "a turn, at many turns": False,
        "first root call of a new process, sandbox on": True,
    }
    figures["rlms:first_call"] = {"to_first_call": 0.77}
    beside = [v for v in rlm_overhead.verdicts(figures, sizes) if "rlms" in v["what"]]
    assert [v["reached"] for v in beside] == [False] and 0.5 < beside[0]["value"] < 0.51


def test_every_target_and_every_row_reads_a_figure_that_its_case_yields():
    names = {case.name: case for case in rlm_cases.cases(rlm_cases.Sizes())}
    spawned = {"called": 1.0, "returned": 2.0, "import_seconds": 0.1, "answer": "0.5"}
    log = {
        "root_times": [float(i) for i in range(12)],
        "root_bytes": [10] * 12,
        "sub_calls": 10,
        "most": 4,
    }
    ran = rlm_cases.Ran(0.0, spawned, log, 100, 50, [(0.0, 1, 2, 3, 4), (9.0, 5, 6, 7, 8)])
    figures = {name: case.read(ran) for name, case in names.items()}
    for case, figure, label, shown in rlm_overhead.ROWS:
        assert shown(figures[case][figure]) and label
    figures["rlms:first_call"] = {"to_first_call": 1.0}
    assert len(rlm_overhead.verdicts(figures, rlm_cases.Sizes())) == len(rlm_overhead.TARGETS)


def test_the_contexts_are_as_long_as_they_say_and_hold_the_needle(tmp_path):
    paths = rlm_cases.write_contexts(tmp_path, rlm_cases.QUICK, {"tiny", "text", "big"})
    assert paths["text"].stat().st_size == rlm_cases.QUICK.text
    text = paths["big"].read_text()
    assert len(text) == rlm_cases.QUICK.file and text.index("NEEDLE") == len(text) * 9 // 10


def test_the_server_ends_with_its_block_and_tells_what_it_was_asked():
    import urllib.request

    with Served(["one", "two"], sub="three") as server:
        said = []
        for model in ("root", "sub", "root", "root"):
            body = json.dumps(
                {"model": model, "messages": [{"role": "user", "content": "x"}]}
            ).encode()
            with urllib.request.urlopen(server.url + "/chat/completions", body) as response:
                said.append(json.load(response)["choices"][0]["message"]["content"])
    assert said == ["one", "three", "two", "two"]
    assert len(server.log["root_times"]) == 3 and server.log["sub_calls"] == server.log["most"] == 1
    assert server.process.returncode == 0
