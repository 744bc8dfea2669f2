"""Fixtures of all tests: devices, and uninitialised memory that shows. Which tests the fast lane leaves out."""
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')  # kernels run on CPUs, where a test asks for them

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the commands, which start processes, and as slow those of compilers, exporters and the Hub.

    Slow are those of models and of windows in Triton's interpreter as well.
    """
    tests = Path(__file__).parent
    for item in items:
        name = item.name.partition('[')[0]
        if tests / 'tools' in item.path.parents:
            item.add_marker('tools')
        elif (item.path.name.startswith(('test_hub', 'test_kernels'))
                or any(word in name for word in ('compile', 'export', 'trace'))
                or ('triton' in item.name and 'qna' in item.name)):
            item.add_marker('slow')
