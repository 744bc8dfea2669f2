"""Fixtures of all tests: devices, and uninitialised memory that shows."""
from collections.abc import Iterator

import pytest
import torch

DEVICES = [pytest.param('cpu'), *([pytest.param('cuda', marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """Every device that is here."""
    return request.param


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Memory that nobody wrote to is NaN: what reads it, fails."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
