from collections.abc import Iterator

import pytest
from wire_ways import WAYS, reading_by


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way of reading JSON, in force for all bodies while the test runs."""
    with reading_by(request.param):
        yield request.param
