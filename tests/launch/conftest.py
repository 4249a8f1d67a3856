"""Two tiny finished runs that the tests of the commands look at and never change."""

import pytest
from train.tiny_run import Trained, run, write_config, write_corpus


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    directory = tmp_path_factory.mktemp("trained")
    config = write_config(directory, write_corpus(directory))
    for kind in ("mor", "vanilla"):
        done = run("train", "--config", f"{config}:{kind}", "--workdir", directory / kind)
        assert done.returncode == 0, done.stderr
    return Trained(directory, config, directory / "mor", directory / "vanilla")
