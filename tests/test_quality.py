"""The quality benchmark's own claims: equal budgets, contrasts of models it has, groups that are
everything once."""

import numpy as np
import pytest

from benchmarks import dial, quality_models
from benchmarks.quality import judged
from mor_jax.analysis import accounting
from mor_jax.analysis.plots import depth_curves
from mor_jax.analysis.sweep import Outcome
from mor_jax.train.sweep import jobs


@pytest.fixture(scope="module")
def sweep():
    return quality_models.sweep("corpus.jsonl")


def test_every_model_gets_the_same_true_flops(sweep):
    spent = [
        accounting.true_training_flops(job.config, job.config.train.steps) for job in jobs(sweep)
    ]
    assert spent == pytest.approx([quality_models.FLOPS] * len(spent), rel=2e-3)
    (varied,) = quality_models.sweep("corpus.jsonl", names=(quality_models.VARIED,)).points
    assert varied.fields["depth.vary"] > 0


def test_contrasts_and_groups_are_of_its_models(sweep):
    names = {p.name for p in sweep.points}
    assert {n for c in quality_models.CONTRASTS for n in (c.better, c.worse)} == names
    assert all(c.paper > 0 for c in quality_models.CONTRASTS)
    first, last = quality_models.groups(sweep)
    assert {p.name for p in (*first.points, *last.points)} == names
    assert [p.labels["model"] for p in last.points] == list(quality_models.LAST)


def test_contrasts_are_judged_by_both_losses(sweep):
    points = {p.name: p for p in sweep.points}
    outcomes = []
    for seed in range(3):
        for name, causal, topk in (("vanilla", 5.0, 5.0), ("MoR_expert", 5.1, 4.9)):
            values = {"causal/nll": causal + 0.01 * seed, "topk/nll": topk + 0.01 * seed}
            outcomes.append(Outcome(points[name], seed, values))
    said = next(
        s for s in judged(outcomes) if (s["better"], s["worse"]) == ("MoR_expert", "vanilla")
    )
    assert said["causal"]["verdict"] == "does not agree" and said["topk"]["verdict"] == "agrees"
    assert "opposite" in said["sentence"]


def test_a_dial_is_judged_by_its_steps():
    def point(asked, depth, nll):
        return {"asked": asked, "mean_depth": depth, "nll": nll}

    good = dial.verdict({"dial": [point(1, 1.0, 3.0), point(3, 2.98, 2.5), point(2, 2.04, 2.7)]})
    assert good["monotone"] and good["within"] and good["fall"] == pytest.approx(0.5)
    bad = dial.verdict({"dial": [point(1, 1.0, 3.0), point(2, 2.2, 2.7), point(3, 3.0, 2.8)]})
    assert not bad["within"] and bad["rises"] == [(2, 3, pytest.approx(0.1))]
    assert "not monotone" in dial.sentence("x", bad) and "not kept" in dial.sentence("x", bad)


def test_dials_are_drawn_against_their_own_depth_1():
    def point(asked, depth, nll):
        return {"asked": asked, "mean_depth": depth, "nll": nll}

    def curve(by):
        return {
            "dial": [point(2, 2.1, 2.5 + by), point(1, 1.0, 3.0 + by)],
            "as_configured": point(2, 2.0, 2.6 + by),
        }

    axes = depth_curves({"a": curve(0), "b": curve(4)}).axes[0]
    a, own_a, b, own_b = (line.get_xydata() for line in axes.lines[:4])
    np.testing.assert_allclose(a, [[1.0, 0.0], [2.1, -0.5]])
    np.testing.assert_allclose(a, b)
    np.testing.assert_allclose(own_a, [[2.0, -0.4]])
    np.testing.assert_allclose(own_a, own_b)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["a (3.000 at depth 1)", "b (7.000 at depth 1)"]
