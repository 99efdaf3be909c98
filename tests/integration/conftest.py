"""Fixtures that several files of integration tests share."""

from __future__ import annotations

import pytest

from tests.integration.kind_cases import FAMILIES, Case, case_of


@pytest.fixture(scope="module", params=["maze", *FAMILIES])
def case(request) -> Case:
    """Every pipeline on which kinds are compared with plain hooks."""
    return case_of(request.param)


@pytest.fixture(scope="module")
def loop_case() -> Case:
    """The pipeline for which a written-out loop exists."""
    return case_of("maze")
