"""`launch.sweep`: tiny sweeps through the real command; skipped, resumed, diverged and parallel
runs."""

import json

import pytest
from train.tiny_run import records, run, start, wait_for_step, write_corpus

from mor_jax.analysis.sweep import Sweep
from mor_jax.errors import ConfigError, UserError
from mor_jax.train.sweep import run_sweep

FILE = """
from ml_collections import ConfigDict


def get_sweep(arg=""):
    base = ConfigDict(
        dict(
            model=dict(layers=1, width=16, heads=2, kv_heads=1, mlp_width=32, context=32, loss_chunk=0),
            data=dict(source="files", paths=({corpus!r},), holdout=0.2),
            train=dict(steps=int(arg or 4), batch_size=4, log_every=1, eval_every=0, eval_rows=8, checkpoint_every=5),
        )
    )
    points = [
        dict(labels=dict(rate="low"), fields={"optim.peak_lr": 1e-3}, paper=2.5),
        dict(labels=dict(rate="high"), fields={"optim.peak_lr": 1e-2}, paper=2.6),
    ]
    return dict(title="Rates", base=base, points=points, seeds=(0, 1), columns=("train_nll",), paper="360M")
"""
NAMES = ["low/seed0", "high/seed0", "low/seed1", "high/seed1"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    d = tmp_path_factory.mktemp("sweep")
    path = d / "rates.py"
    path.write_text(FILE.replace("{corpus!r}", repr(str(write_corpus(d)))))
    return path


@pytest.fixture(scope="module")
def done(file):
    """A finished sweep and what the command printed."""
    workdir = file.parent / "done"
    result = run("sweep", file, "--workdir", workdir)
    assert result.returncode == 0, result.stderr
    return workdir, result.stdout


def test_one_table_one_plot_json_and_csv(done):
    workdir, printed = done
    record = json.loads((workdir / "sweep.json").read_text())
    assert [f"{r['labels']['rate']}/seed{r['seed']}" for r in record["runs"]] == NAMES
    for point in record["points"]:
        assert point["seeds"] == 2 and point["spread"]["causal/nll"] > 0  # seeds are different runs
        assert f"{point['mean']['causal/nll']:.4f} ± {point['spread']['causal/nll']:.4f}" in printed
    for run_ in record["runs"]:
        directory = workdir / run_["labels"]["rate"] / f"seed{run_['seed']}"
        assert run_["values"]["causal/nll"] == records(directory, "eval")[-1]["causal/nll"]
    assert "paper: 360M" in printed and "2.5000" in printed
    assert (workdir / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len((workdir / "sweep.csv").read_text().splitlines()) == 5
    assert "| low |" in (workdir / "sweep.md").read_text()


def test_finished_runs_are_skipped_and_others_are_refused(done, file):
    workdir, _ = done
    times = {p: p.stat().st_mtime_ns for p in workdir.glob("*/seed*/metrics.jsonl")}
    again = run("sweep", file, "--workdir", workdir)
    assert again.returncode == 0 and "4 of them finished" in again.stdout, again.stderr
    assert {p: p.stat().st_mtime_ns for p in times} == times and len(times) == 4
    other = run("sweep", file, "--workdir", workdir, "--set", "model.width=32")
    assert other.returncode == 2 and "config.model.width: 16 there, 32 here" in other.stderr


def test_an_interrupted_sweep_goes_on_where_it_stopped(done, file, tmp_path):
    workdir = tmp_path / "cut"
    args = (f"{file}:60", "--workdir", workdir, "--seeds", "0")
    process = start("sweep", *args)
    wait_for_step(process, workdir / "low" / "seed0", 10)
    process.terminate()
    assert process.wait(60) == 2  # saved, and said so
    assert not (workdir / "low" / "seed0" / "summary.json").exists()
    kept = len(records(workdir / "low" / "seed0", "train"))
    assert kept >= 10
    again = run("sweep", *args)
    assert again.returncode == 0 and "Resuming" in again.stdout + again.stderr, again.stderr
    steps = [r["step"] for r in records(workdir / "low" / "seed0", "train")]
    assert steps == list(range(1, 61))
    assert len(json.loads((workdir / "sweep.json").read_text())["runs"]) == 2


def test_runs_in_parallel_give_the_same_numbers(done, file, tmp_path):
    result = run("sweep", file, "--workdir", tmp_path / "two", "--parallel", 2)
    assert result.returncode == 0, result.stderr
    both = [
        json.loads((d / "sweep.json").read_text())["points"] for d in (done[0], tmp_path / "two")
    ]
    assert both[0] == both[1]
    assert len(list((tmp_path / "two" / "logs").iterdir())) == 4
    assert {f"started {name}" for name in NAMES} <= set(result.stdout.splitlines())


def small(file, **more):
    base = {
        "model": {
            "layers": 1,
            "width": 16,
            "heads": 2,
            "kv_heads": 1,
            "mlp_width": 32,
            "context": 32,
        },
        "data": {"source": "files", "paths": (str(file.parent / "corpus.jsonl"),), "holdout": 0.2},
        "train": {
            "steps": 3,
            "batch_size": 4,
            "eval_rows": 8,
            "eval_every": 0,
            "checkpoint_every": 0,
        },
    }
    return {"title": "Small", "base": base, "seeds": (0,)} | more


def test_a_block_repeated_in_place_is_trained_to_its_summary(file, tmp_path):
    """A fixed depth has no measured shares: the summary must not ask for one a recursion."""
    fields = {"model.layers": 2, "model.recursions": 2, "train.steps": 1}
    sweep = Sweep.from_dict(small(file, grid={"model.sharing": ("sequence",)}))
    [outcome] = run_sweep(sweep, tmp_path, fields=fields, say=lambda _: None, progress=False)
    assert outcome.values["causal/nll"] > 0 and outcome.values["steps"] == 1


def test_divergence_is_a_result(file, tmp_path):
    raw = small(file, title="Too fast", grid={"optim.peak_lr": (1e-3, 1e30)})
    said = []
    for _ in range(2):  # the second time there is nothing to do
        found = run_sweep(Sweep.from_dict(raw), tmp_path, say=said.append, progress=False)
        assert [bool(o.failure) for o in found] == [False, True] and "not finite" not in found[
            0
        ].failure
    assert said[-1] == "Too fast: 2 runs, 2 of them finished."
    with pytest.raises(ConfigError, match="another configuration"):
        run_sweep(Sweep.from_dict(raw), tmp_path, fields={"train.steps": 4}, say=said.append)


def test_a_broken_run_stops_the_sweep_with_its_message(file, tmp_path):
    result = run(
        "sweep",
        file,
        "--workdir",
        tmp_path,
        "--parallel",
        2,
        "--set",
        "data.paths=('/nowhere/*.txt',)",
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    message = result.stderr.strip().splitlines()[-1]
    assert "seed0 ended with status 2: error:" in message and "/nowhere/*.txt" in message
    with pytest.raises(UserError, match="nowhere"):
        sweep = Sweep.from_dict(
            {"title": "x", "base": {"train": {"steps": 1}}, "grid": {"data.source": ("files",)}}
        )
        run_sweep(
            sweep,
            tmp_path / "one",
            fields={"data.paths": ["/nowhere/*.txt"]},
            say=lambda _: None,
            progress=False,
        )


def test_a_real_ablation_in_seconds(file, tmp_path):
    """`configs/ablations/sharing.py:tiny`, two runs of it, on a corpus that is at hand."""
    args = (
        "configs/ablations/sharing.py:tiny",
        "--workdir",
        tmp_path,
        "--seeds",
        "3",
        "--set",
        "train.steps=2",
        "--set",
        f"data.paths=({str(file.parent / 'corpus.jsonl')!r},)",
    )
    listed = run("sweep", *args, "--dry_run").stdout.split()
    assert len(listed) == 11 and "middle_cycle-N_r3/seed3" in listed
    alone = run("sweep", *args, "--run", "middle_cycle-N_r3/seed3")
    assert (
        alone.returncode == 0
        and (tmp_path / "middle_cycle-N_r3" / "seed3" / "summary.json").exists()
    ), alone.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--workdir", "x"), ["name one sweep file"]),
        (("configs/ablations/sharin.py", "--workdir", "x"), ["sharin.py", "sharing.py"]),
        (("configs/mor.py", "--workdir", "x"), ["configs/mor.py", "get_sweep"]),
        (("configs/ablations/sharing.py:370m", "--workdir", "x"), ["370m", "360m"]),
        (("configs/ablations/sharing.py:tiny", "--workdir", "x", "--seeds", "a"), ["--seeds", "a"]),
        (
            ("configs/ablations/sharing.py:tiny", "--workdir", "x", "--set", "steps"),
            ["'steps'", "field=value"],
        ),
        (
            ("configs/ablations/sharing.py:tiny", "--workdir", "x", "--run", "y"),
            ["'y'", "--dry_run"],
        ),
    ],
)
def test_mistakes_are_one_line(args, words):
    result = run("sweep", *args)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ") and all(word in message for word in words)
