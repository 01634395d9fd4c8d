"""What tests of training share."""

from collections.abc import Iterator

import pytest

from tests.programs import shared_programs


@pytest.fixture(autouse=True, scope="session")
def programs() -> Iterator[None]:
    yield from shared_programs()
