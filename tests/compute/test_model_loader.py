"""What a run is given, and what it leaves behind."""

import gc
import weakref

import pytest

from less_assets.compute.models import spared_from_collection


class Model:
    """Refers to itself, as models of transformers and PEFT do: only the collector frees it."""

    def __init__(self) -> None:
        self.parent = self


@pytest.fixture
def no_collection_by_itself():
    """Nothing is freed because the collector happened to run."""
    gc.disable()
    yield
    gc.enable()


def test_a_runs_models_are_freed_at_its_end_even_if_it_failed(no_collection_by_itself):
    for error in (None, RuntimeError("out of memory")):
        try:
            with spared_from_collection():
                left = weakref.ref(Model())
                if error:
                    raise error
        except RuntimeError:
            pass
        assert left() is None


def test_what_was_there_before_is_skipped_during_the_block_and_only_then(no_collection_by_itself):
    before = weakref.ref(Model())
    with spared_from_collection():
        gc.collect()
        assert before() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert before() is None
