"""Overlap of texts that are known to overlap, and of texts that only look like it."""

import json

from less_assets.method.data.contamination import COMMON_ROWS, EvaluatedRows
from less_assets.method.data.conversations import example_id
from less_assets.method.data.targets import EvaluationExample, TargetExample, read_evaluation, read_targets

STORY = "the old clock in the hall of our house struck nine times before anybody noticed that the door was open"


def user(content):
    return [{"role": "user", "content": content}]


def conversation(question, answer):
    return [*user(question), {"role": "assistant", "content": answer}]


def asked(question, answer="yes", number=0):
    return EvaluationExample(f"e{number}", "all", user(question), "", [answer], "exact_match", answer)


def target(question, answer="yes"):
    return TargetExample(f"t-{question[:8]}", "all", user(question), "", answer)


def look_up(rows, examples, benchmark=False):
    index = EvaluatedRows(examples, benchmark=benchmark)
    index.look_up([(example_id(row), row) for row in rows])
    return index.found()


def test_the_very_row_is_found_by_its_id_however_short():
    found = look_up([conversation("2 + 2?", "4"), conversation("2 + 2?", "5")], [asked("2 + 2?", "4")])
    assert (found.exact, found.shared, found.evaluated) == (1, 1, 1)
    assert found.pairs == [(example_id(conversation("2 + 2?", "4")), "e0")]


def test_thirteen_words_in_a_row_are_an_overlap_and_twelve_are_not():
    words = STORY.split()
    for count, shared in ((13, 1), (12, 0)):
        row = conversation("Continue, please: " + " ".join(words[2 : 2 + count]).upper() + "!", "no")
        found = look_up([row], [asked(STORY)])
        assert (found.exact, found.shared) == (0, shared), count


def test_the_reference_answer_counts_too():
    assert look_up([conversation("Say it.", STORY)], [asked("What happened?", STORY)]).shared == 1


def test_wording_that_all_questions_share_is_no_overlap():
    instruction = "Please read the following text with care and then answer in as few words as you possibly can. "
    examples = [asked(f"{instruction} Number {place}?", number=place) for place in range(COMMON_ROWS + 1)]
    assert look_up([conversation(instruction + "Something else?", "no")], examples).shared == 0
    assert look_up([conversation(instruction + "Something else?", "no")], examples[:COMMON_ROWS]).shared == 1


def test_what_is_found_adds_up_over_shards():
    index = EvaluatedRows([asked(STORY)], benchmark=False)
    for _ in range(2):
        index.look_up([("row", conversation(STORY, "no"))])
    assert (index.found().shared, index.found().evaluated) == (2, 1)


def test_a_target_that_is_evaluated_is_found_and_others_are_not():
    index = EvaluatedRows([asked("Who owns the red house?"), asked("Why?", number=1)], benchmark=False)
    same, contained, other = (
        target("Who owns the RED house"),
        target("Tell me: who owns the red house?"),
        target("Who?"),
    )
    short = target("And why?")
    assert index.targets_inside([same, contained, other, short]) == [
        (same.example_id, "e0"),
        (contained.example_id, "e0"),
    ]
    assert index.targets_inside([target("why")]) == [("t-why", "e1")]


def test_benchmarks_share_an_instruction_and_not_their_questions(tmp_path):
    block = "Say where you are.\n\n" + "\n\n".join(
        f"Q: Go {word} and then home?\nA: No." for word in ("up", "on", "in")
    )
    (tmp_path / "bbh-three-shot.json").write_text(json.dumps({"navigate": block}))
    (tmp_path / "test").mkdir()
    for question, inside in (("Go left and then home?", 0), ("Go on and then home?", 3)):
        examples = {"examples": [{"input": question, "target": "No"}]}
        (tmp_path / "test/navigate.json").write_text(json.dumps(examples))
        index = EvaluatedRows(read_evaluation("bbh", str(tmp_path), few_shot=False), benchmark=True)
        # The worked examples stand in each other's prompts: the evaluated one is in all three targets.
        assert len(index.targets_inside(read_targets("bbh", str(tmp_path)))) == inside
