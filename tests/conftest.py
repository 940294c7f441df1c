"""One thread and one seed for every test, so that each is repeatable by itself."""

import gc
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("growmoe", deadline=None, print_blob=True)
settings.load_profile("growmoe")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()  # imports make nothing that could go
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch  # here, because the process that hands out tests to workers needs none

    torch.set_num_threads(1)
    # the longest first, so that no worker is left with one of them at the end; of the notebooks
    # the last ones, so that the one with a Ray is over when other tests start a Ray
    slow = [item for item in items if item.get_closest_marker("slow")]
    notebooks = [item for item in slow if item.path.name == "test_tutorials.py"]
    first = [*reversed(notebooks), *(item for item in slow if item not in notebooks)]
    items[:] = [*first, *(item for item in items if not item.get_closest_marker("slow"))]


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_search() -> None:
    # surgery looks through all living objects for optimizers, and collects the dead before it;
    # those of imports and of earlier modules are neither
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
