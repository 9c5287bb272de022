"""Fixtures shared by the end-to-end tests."""

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Soak tests run under `make soak` alone."""
    if os.environ.get("SCLS_SOAK") == "1":
        return
    skip = pytest.mark.skip(reason="a soak test: run it with `make soak`")
    for item in items:
        if "soak" in item.keywords:
            item.add_marker(skip)
