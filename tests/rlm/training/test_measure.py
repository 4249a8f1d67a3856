"""Success at the runtime's tasks as a measure in training: what joins the evaluation's record, and
what it counts."""

import json
import re

from mor_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from mor_jax.data.vocabulary import ByteTokenizer
from mor_jax.train.loop import train
from rlm.fake_environment import FakeEnvironment
from rlm.loop_helpers import cell
from rlm_runtime.lms.function import FunctionLM
from rlm_runtime.tasks.evaluate import evaluate
from rlm_runtime.training.measure import record


def test_success_turns_and_format_errors_are_counted(tmp_path):
    """One model that finds the needle after a reply without code."""

    def model(messages, **options):
        if len(messages) == 2:
            return "I will look for it."
        key = re.search(r"for (\S+) mentioned", messages[1]["content"])[1]
        return cell(
            f"import re\nanswer['content'] = re.search({key!r} + r' is: (\\d+)', context)[1]\nanswer['ready'] = True"
        )

    done = evaluate(
        "s_niah",
        "2k",
        "rlm",
        root=FunctionLM(model),
        samples=2,
        out=tmp_path / "out",
        plot=False,
        rlm={"log_dir": tmp_path / "runs", "environment": FakeEnvironment},
    )
    assert record(done.rows) == {
        "rlm/s_niah/2000/success": 1.0,
        "rlm/s_niah/2000/score": 1.0,
        "rlm/s_niah/2000/turns": 2.0,
        "rlm/s_niah/2000/sub_calls": 0.0,
        "rlm/s_niah/2000/format_errors": 1.0,
    }


def test_a_measure_joins_the_record_of_each_evaluation(tmp_path):
    (tmp_path / "a.txt").write_text("some text to read, again and again. " * 100)
    (tmp_path / "b.txt").write_text("another text, quite unlike it: zebra. " * 100)
    config = Config(
        model=ModelConfig(
            layers=1, width=16, heads=2, kv_heads=1, mlp_width=32, context=32, loss_chunk=0
        ),
        data=DataConfig(
            source="files",
            paths=(str(tmp_path / "*.txt"),),
            tokenizer="bytes",
            holdout=0.5,
            cache_dir=str(tmp_path),
        ),
        optim=OptimConfig(),
        train=TrainConfig(steps=2, batch_size=2, eval_every=1, eval_rows=2, checkpoint_every=0),
    )
    seen = []

    def measure(model):
        seen.append((model.step, model.tokenizer.vocab_size, model.lm.model.context))
        return {"rlm/x/success": 0.5}

    train(config, tmp_path / "run", progress=False, measure=measure)
    assert seen == [(1, ByteTokenizer().vocab_size, 32), (2, ByteTokenizer().vocab_size, 32)]
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["rlm/x/success"] for r in records if r["kind"] == "eval"] == [0.5, 0.5]
