"""One thread and one seed for every test, so that each is repeatable by itself."""

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("growmoe", deadline=None, print_blob=True)
settings.load_profile("growmoe")


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_search() -> Iterator[None]:
    # surgery looks through all living objects for optimizers; those of the imports can wait
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
