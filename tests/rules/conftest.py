"""Shared by the tests of rules."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_search():
    # surgery looks through all living objects for optimizers; those of the imports can wait
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
