"""One model and one server for all tests of the endpoint that do not stop or fill it."""

import pytest

from serve.support import batched, running, small_model


@pytest.fixture(scope="session")
def small():
    return small_model()


@pytest.fixture(scope="session")
def server(small):
    with running(batched(small)) as server:
        yield server
