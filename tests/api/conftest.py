"""The API, checked against its own description."""

import pytest

from tests.support.contract import Api
from tests.support.engine import Engine


@pytest.fixture
def api(engine: Engine) -> Api:
    """The API of the engine that all tests share."""
    return Api(engine)
