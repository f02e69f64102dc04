"""Rows that the trained model refuses, though the project's own takes them: counted, said, and warned of."""

from types import SimpleNamespace

import pytest
from support.chat_templates import FAMILIES

from less_assets.errors import PoolFormatError
from less_assets.method.data.chat import ChatEncoder
from less_assets.method.data.examples import PoolRow, pool_table
from less_assets.reading.files import SUBSET
from less_assets.steps.checks import check_trained_rows
from less_assets.steps.finetuning import subset_examples
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.tables import write_parquet

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The fox."}]
SYSTEM = {"role": "system", "content": "Be brief."}
LONG = [{"role": "user", "content": "the fox " * 90}, TURNS[1]]


@pytest.fixture
def subset(tmp_path):
    """A step whose subset has the given conversations; Gemma 2's template, which has no system turns."""

    def make(*conversations):
        store = ArtifactStore(str(tmp_path / "store"))
        rows = [PoolRow(f"row-{i}", "s", "f", i, turns, None, "ok", None) for i, turns in enumerate(conversations)]
        with store.writing("subset", "0" * 32) as folder:
            write_parquet(folder, SUBSET, pool_table(rows))
            folder.seal(kind="selected_subset")
        said: list[str] = []
        tokenizer = FAMILIES["gemma2"].tokenizer
        return SimpleNamespace(
            lineage=SimpleNamespace(folder=lambda asset, partition: store.artifact("subset", "0" * 32)),
            models=SimpleNamespace(encoder=lambda tokenizer: ChatEncoder(tokenizer, "template", 64)),
            partition="less-t|sums",
            name="finetuned_model less-t|sums",
            log=said.append,
            said=said,
            tokenizer=tokenizer,
        )

    return make


def test_refused_rows_are_counted_by_reason_and_said(subset):
    work = subset(TURNS, [SYSTEM, *TURNS], LONG, TURNS, [SYSTEM, *TURNS])
    examples, refused = subset_examples(work, "selected_subset", work.tokenizer)
    assert [example.example_id for example in examples] == ["row-0", "row-3"]
    assert refused == {"prompt_too_long": 1, "template_refuses": 2}
    (line,) = work.said
    assert line.startswith("warning: finetuned_model less-t|sums: 3 of 5 selected rows are not trained on; row-1: ")


def test_nothing_is_said_where_every_row_is_trained_on(subset):
    work = subset(TURNS)
    examples, refused = subset_examples(work, "selected_subset", work.tokenizer)
    assert (len(examples), refused, work.said) == (1, {}, [])


def test_a_model_that_refuses_every_row_is_an_error_with_the_first_reason(subset):
    work = subset([SYSTEM, *TURNS])
    with pytest.raises(PoolFormatError, match="can use no selected row; the first says"):
        subset_examples(work, "selected_subset", work.tokenizer)


@pytest.mark.parametrize(
    ("summary", "passed", "words"),
    [
        ({"trained": True, "examples": 8}, True, "Every selected row"),
        ({"trained": False, "examples": 0}, True, "Nothing is trained"),
        ({"trained": True, "examples": 6, "refused": {"template_refuses": 2}}, False, "2 of 8 selected rows"),
    ],
)
def test_the_check_warns_of_refused_rows(summary, passed, words):
    lineage = SimpleNamespace(summary=lambda asset, key: summary)
    verdict = check_trained_rows(lineage, "less-t|sums", None, None)
    assert verdict.passed is passed
    assert words in verdict.said
