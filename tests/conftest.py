"""One thread and one seed for every test, so that each is repeatable by itself."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("growmoe", deadline=None, print_blob=True)
settings.load_profile("growmoe")


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)
