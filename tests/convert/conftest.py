"""What is compiled here runs for milliseconds."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compilation):
    """All modules of this folder."""
