"""How many steps a warm-up has, what is said if they are too few, and that what is advised helps."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import TinyProject

from less_assets.project.data_check import few_warmup_steps
from less_assets.project.project import load_project
from less_assets.project.sections import Warmup
from less_assets.project.warmup_steps import FEWEST_STEPS, enough_rows, few_steps, steps_of

warmups = st.builds(
    Warmup,
    epochs=st.integers(1, 30),
    batch_size=st.integers(1, 256),
    fraction=st.sampled_from([0.01, 0.05, 0.3, 0.5, 1.0]),
)


@given(warmups, st.integers(1, 5000))
def test_steps_are_whole_batches_of_every_epoch(warmup, rows):
    batches = len(range(0, rows, warmup.batch_size))
    assert steps_of(warmup, rows) == batches * warmup.epochs


@given(warmups)
def test_enough_rows_are_the_fewest_that_suffice(warmup):
    def steps(rows: int) -> int:
        return steps_of(warmup, int(warmup.fraction * rows + 1e-9))

    assert steps(enough_rows(warmup)) >= FEWEST_STEPS
    assert enough_rows(warmup) == 1 or steps(enough_rows(warmup) - 1) < FEWEST_STEPS


@given(warmups, st.integers(1, 400))
def test_the_batch_size_that_is_advised_makes_the_steps_enough_and_is_the_largest(warmup, rows):
    said = few_steps(warmup, steps_of(warmup, rows), rows)
    assert (said is None) == (steps_of(warmup, rows) >= FEWEST_STEPS)
    if said is None:
        return
    assert said.startswith(f"the warm-up has {steps_of(warmup, rows)} optimizer steps")
    advised = re.search(r"batch_size` to (\d+) or less", said)
    if advised is None:
        assert steps_of(warmup.model_copy(update={"batch_size": 1}), rows) < FEWEST_STEPS
        return
    largest = int(advised[1])
    assert steps_of(warmup.model_copy(update={"batch_size": largest}), rows) >= FEWEST_STEPS
    assert steps_of(warmup.model_copy(update={"batch_size": largest + 1}), rows) < FEWEST_STEPS


def test_an_imported_warm_up_is_told_to_be_longer():
    assert "import checkpoints of a longer training" in str(few_steps(Warmup(), 3, None))


@pytest.mark.parametrize(("batch_size", "told"), [(4, True), (2, False)])
def test_check_counts_the_rows_of_the_pool(tmp_path, tiny_model, batch_size, told):
    tiny = TinyProject(tmp_path, tiny_model)  # 44 rows, of which half are drawn for two epochs
    tiny.settings["warmup"]["batch_size"] = batch_size
    said = few_warmup_steps(load_project(tiny.path))
    assert bool(said) is told
    if told:
        assert "the warm-up has 12 optimizer steps, fewer than 20" in said[0]
        assert "`warmup.batch_size` to 2 or less" in said[0]
