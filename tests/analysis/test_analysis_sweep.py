"""A sweep as data: what a file may say, and what table, CSV and plot make of outcomes."""

import csv
import io
import json
import statistics

import pytest
from rich.console import Console

from configs.ablations import (
    balancing,
    isoflop,
    kv,
    random_routing,
    recursions,
    relaxation,
    routers,
    sharing,
)
from mor_jax.analysis.sweep import (
    COLUMNS,
    Outcome,
    Sweep,
    best,
    plot,
    summarise,
    to_csv,
    to_json,
    to_markdown,
    to_table,
)
from mor_jax.errors import ConfigError
from mor_jax.train.sweep import jobs

FILES = {
    "sharing": sharing,
    "routers": routers,
    "balancing": balancing,
    "isoflop": isoflop,
    "recursions": recursions,
    "kv": kv,
    "random_routing": random_routing,
    "relaxation": relaxation,
}
SIZES = ("tiny", "small", "135m", "360m", "730m", "1.7b")


def two_by_two(**more):
    return Sweep.from_dict(
        {
            "title": "rates",
            "base": {},
            "grid": {"optim.peak_lr": (1e-3, 2e-3), "model.layers": (2, 4)},
            "seeds": (0, 1, 2),
            "columns": ("tokens",),
        }
        | more
    )


def outcomes(sweep, spread=0.1):
    """Losses 1, 2, 3, ... by point, -spread, 0, +spread by seed; the last point diverges at the
    last seed."""
    found = []
    for seed in sweep.seeds:
        for i, point in enumerate(sweep.points, 1):
            values = {"causal/nll": i + spread * (seed - 1), "tokens": 1000.0}
            found.append(Outcome(point, seed, values))
    found[-1] = Outcome(sweep.points[-1], sweep.seeds[-1], failure="loss is nan at step 3")
    return found


def test_a_grid_is_every_combination():
    sweep = two_by_two()
    assert [dict(p.fields) for p in sweep.points] == [
        {"optim.peak_lr": lr, "model.layers": layers} for lr in (1e-3, 2e-3) for layers in (2, 4)
    ]
    assert (
        sweep.label_names == ("peak_lr", "layers")
        and sweep.points[1].name == "peak_lr0.001-layers4"
    )
    both = two_by_two(points=[{"labels": {"a": "x"}, "fields": {"name": "x"}}])
    assert len(both.points) == 4 and dict(both.points[0].labels) == {
        "a": "x",
        "peak_lr": "0.001",
        "layers": "2",
    }


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"sedes": (1,)}, "'sedes'.*seeds"),
        ({"grid": {}}, "nothing to run"),
        ({"metric": "loss"}, "'loss'.*causal/nll"),
        ({"seeds": ()}, "no seeds"),
        ({"grid": {"a.x": (1, 1)}}, "two points.*x1"),
    ],
)
def test_a_bad_sweep_is_named(more, words):
    with pytest.raises(ConfigError, match=words):
        two_by_two(**more)
    with pytest.raises(ConfigError, match="'title'"):
        Sweep.from_dict({"base": {}})


def test_mean_and_spread_over_seeds():
    sweep = two_by_two()
    lines = summarise(sweep, outcomes(sweep))
    assert [line.mean("causal/nll") for line in lines[:3]] == pytest.approx([1, 2, 3])
    assert lines[0].spread("causal/nll") == pytest.approx(statistics.stdev([0.9, 1.0, 1.1]))
    assert (lines[3].runs, lines[3].failures, len(lines[3].values["causal/nll"])) == (3, 1, 2)
    assert best(sweep, lines) == 0
    one = summarise(sweep, [o for o in outcomes(sweep) if o.seed == 0])
    assert one[0].spread("causal/nll") is None
    assert summarise(sweep, []) == []


def test_table_markdown_csv_and_json_agree():
    sweep = two_by_two(
        points=[{"labels": {"kind": "a|b"}, "fields": {}, "paper": 2.5}], grid={}, paper="360M"
    )
    found = outcomes(sweep)[:2]
    out = io.StringIO()
    Console(file=out, width=140).print(to_table(sweep, found))
    for text in (out.getvalue(), to_markdown(sweep, found)):
        assert "0.9500 ± 0.0707" in text and "2.5000" in text
        assert "paper: 360M" in text and "compare the ordering" in text.replace("\n", " ")
    assert "a\\|b" in to_markdown(sweep, found)
    rows = list(csv.DictReader(io.StringIO(to_csv(sweep, found))))
    assert [float(r["causal/nll"]) for r in rows] == pytest.approx([0.9, 1.0]) and rows[0][
        "kind"
    ] == "a|b"
    assert set(COLUMNS) < set(rows[0])
    record = json.loads(json.dumps(to_json(sweep, found)))
    assert (
        record["points"][0]["mean"]["causal/nll"] == pytest.approx(0.95)
        and len(record["runs"]) == 2
    )


def test_a_diverged_run_is_counted_not_averaged():
    sweep = two_by_two()
    assert "3, 1 diverged" in to_markdown(sweep, outcomes(sweep))
    gone = [Outcome(sweep.points[0], s, failure="nan") for s in sweep.seeds]
    assert (
        "3, 3 diverged" in to_markdown(sweep, gone) and best(sweep, summarise(sweep, gone)) is None
    )
    assert plot(sweep, gone) is not None


def test_plots_have_a_row_a_point_or_a_line_a_group():
    sweep = two_by_two()
    labels = [t.get_text() for t in plot(sweep, outcomes(sweep)).axes[0].get_yticklabels()]
    assert labels == ["0.001 2", "0.001 4", "0.002 2", "0.002 4"]
    lines = two_by_two(x="layers")
    axes = plot(lines, outcomes(lines)).axes[0]
    assert axes.get_legend_handles_labels()[1] == ["0.001", "0.002"] and axes.get_xscale() == "log"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["2", "4"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FILES)
def test_every_run_of_every_ablation_passes_the_door(name, size):
    sweep = Sweep.from_dict(FILES[name].get_sweep(size))
    found = jobs(sweep)
    assert len(found) == len(sweep.points) * 3 and len({job.name for job in found}) == len(found)
    assert {job.config.train.seed for job in found} == {0, 1, 2}
    assert sweep.paper and any(p.paper for p in sweep.points)


def test_ablations_ask_what_their_tables_ask():
    from mor_jax.model.program import build_program

    def by_name(module, size):
        return {p.name: p for p in Sweep.from_dict(module.get_sweep(size)).points}

    blocks = {
        job.point.name: build_program(job.config.model)
        for job in jobs(Sweep.from_dict(sharing.get_sweep("360m")))
    }
    # Table 10's models: 10-layer reduced twin and core, one prelude and one coda block in the
    # middle schemes.
    assert (
        blocks["reduced_to_1_3-N_r1"].unrolled_layers == 10
        and blocks["cycle-N_r3"].unrolled_layers == 30
    )
    assert (blocks["middle_cycle-N_r3"].core, blocks["middle_cycle-N_r3"].unrolled_layers) == (
        10,
        32,
    )
    assert by_name(sharing, "135m")["cycle-N_r2"].paper == 3.0071
    unique = {
        build_program(job.config.model).unique_layers
        for job in jobs(Sweep.from_dict(recursions.get_sweep("360m")))
    }
    assert unique == {12}
    spent = {job.config.train.flops for job in jobs(Sweep.from_dict(isoflop.get_sweep("360m")))}
    assert spent == {2e18, 5e18, 16.5e18}
    steps = {job.config.train.steps for job in jobs(Sweep.from_dict(sharing.get_sweep("360m")))}
    assert steps == {4768}  # 10B tokens of 2.1M a step
    with pytest.raises(ConfigError, match="370m"):
        sharing.get_sweep("370m")


def test_overrides_reach_every_run_and_a_bad_one_names_its_point():
    sweep = Sweep.from_dict(sharing.get_sweep("tiny"))
    assert {job.config.train.steps for job in jobs(sweep, fields={"train.steps": 3})} == {3}
    with pytest.raises(ConfigError, match=r"'full-N_r1'.*train\.stps.*steps"):
        jobs(sweep, fields={"train.stps": 3})
    with pytest.raises(ConfigError, match="holds no others"):
        jobs(sweep, fields={"name.x": 3})
