"""Target and evaluation examples: the published prompts, written out by hand, and no example ever dropped."""

import csv
import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from less_assets.errors import TargetFormatError
from less_assets.method.data.conversations import example_id
from less_assets.method.data.targets import (
    TARGET_SCHEMA,
    TYDIQA_WORDS,
    TargetExample,
    read_evaluation,
    read_targets,
    target_table,
    targets_from_table,
)
from less_assets.method.evaluation.answers import RULES

TASKS = Path(__file__).parents[3].parent / "shared" / "data" / "tasks"
needs_tasks = pytest.mark.skipif(not TASKS.is_dir(), reason="../shared/data/tasks is not there")

BBH = {
    "navigate": (
        "Say where you are.\n\nMind the order.\n\n"
        "Q: Go left. Home? \nA: Let's think.\nLeft is not home. So the answer is No.\n\n"
        "Q: Stay. Home?\nA: Nothing moved. So the answer is Yes.\n\n"
        "Q: Go right. Home?\nA: Right is not home. So the answer is No."
    ),
    "counting": "Count.\n\nQ: a\nA: 1\n\nQ: a b\nA: 2\n\nQ: a b c\nA: 3",
}
DEV = 'What is 2 + 2?,3,4,"5, or so",6,B\nA second one?,w,x,y,z,D\n'
TEST = 'What is 1.50 + NA?,1.50,"a ""b""",None,nan,C\n'
ONE_SHOT = {
    "english": [
        {"context": "Ann owns the\nhouse.", "question": "Who owns it?", "answers": [{"text": "Ann"}, {"text": "her"}]}
    ],
    "korean": [{"context": "맥락", "question": "누구?", "answers": [{"text": "앤"}]}],
}
EIGHT_SHOT = [
    {"question": "Two and two?", "cot_answer": "2 + 2 = 4. So the answer is 4.", "short_answer": "4"},
    {"question": "Half of 8?", "cot_answer": "8 / 2 = 4. So the answer is 4.", "short_answer": "4"},
]


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def write_text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8", newline="\n")
    return path


def user(content: str) -> list:
    return [{"role": "user", "content": content}]


def assert_ids_are_of_the_whole_conversation(examples):
    for each in examples:
        last = {"role": "assistant", "content": each.assistant_prefix + each.completion}
        assert each.example_id == example_id([*each.messages, last])


# ---- targets: golden prompts ----


def test_bbh_targets_hold_the_other_two_worked_examples(tmp_path):
    file = write_json(tmp_path / "bbh-three-shot.json", BBH)
    examples = read_targets("bbh", str(file))
    assert [each.subtask for each in examples] == ["navigate"] * 3 + ["counting"] * 3
    first, second, third = examples[:3]
    assert first.messages == user(
        "Say where you are.\n\nMind the order.\n\n"
        "Q: Stay. Home?\nA: Nothing moved. So the answer is Yes.\n\n"
        "Q: Go right. Home?\nA: Right is not home. So the answer is No.\n\n"
        "Q: Go left. Home? "
    )
    assert first.assistant_prefix == "A:"
    assert first.completion == " Let's think.\nLeft is not home. So the answer is No."
    assert second.messages[0]["content"].endswith("Right is not home. So the answer is No.\n\nQ: Stay. Home?")
    assert third.completion == " Right is not home. So the answer is No."
    assert examples[3].messages == user("Count.\n\nQ: a b\nA: 2\n\nQ: a b c\nA: 3\n\nQ: a")
    assert_ids_are_of_the_whole_conversation(examples)
    assert read_targets("bbh", str(tmp_path)) == examples


def test_mmlu_targets_are_zero_shot_with_two_spaces_before_the_subject(tmp_path):
    write_text(tmp_path / "dev" / "high_school_biology_dev.csv", DEV)
    write_text(tmp_path / "dev" / "anatomy_dev.csv", DEV * 4)
    examples = read_targets("mmlu", str(tmp_path))
    assert [each.subtask for each in examples] == ["anatomy"] * 5 + ["high_school_biology"] * 2
    assert examples[5] == TargetExample(
        examples[5].example_id,
        "high_school_biology",
        user(
            "The following are multiple choice questions (with answers) about  high school biology.\n\n"
            "What is 2 + 2?\nA. 3\nB. 4\nC. 5, or so\nD. 6\nAnswer:"
        ),
        "The answer is:",
        " B",
    )
    assert examples[6].completion == " D"
    assert_ids_are_of_the_whole_conversation(examples)
    assert read_targets("mmlu", str(tmp_path / "dev")) == examples


def test_tydiqa_targets_are_in_their_language_without_a_newline_before_the_passage(tmp_path):
    file = write_json(tmp_path / "dev" / "tydiqa-one-shot.json", ONE_SHOT)
    english, korean = read_targets("tydiqa", str(tmp_path))
    assert english.messages == user(
        "Answer the following question based on the information in the given passage."
        "Passage: Ann owns the\nhouse.\nQuestion: Who owns it?\n"
    )
    assert (english.subtask, english.assistant_prefix, english.completion) == ("english", "Answer:", " Ann")
    assert korean.messages == user("주어진 문단의 정보에 기반하여 다음 질문에 답하십시오.문단: 맥락\n질문: 누구?\n")
    assert (korean.assistant_prefix, korean.completion) == ("답변:", " 앤")
    assert_ids_are_of_the_whole_conversation([english, korean])
    assert read_targets("tydiqa", str(file)) == [english, korean]


def test_gsm8k_targets_are_question_and_worked_answer(tmp_path):
    write_json(tmp_path / "cot-8-shot.json", EIGHT_SHOT)
    examples = read_targets("gsm8k", str(tmp_path))
    assert [(each.messages, each.assistant_prefix, each.completion) for each in examples] == [
        (user("Two and two?"), "", "2 + 2 = 4. So the answer is 4."),
        (user("Half of 8?"), "", "8 / 2 = 4. So the answer is 4."),
    ]
    assert_ids_are_of_the_whole_conversation(examples)


def test_the_words_of_tydiqa_are_nine_languages():
    assert sorted(TYDIQA_WORDS) == [
        "arabic",
        "bengali",
        "english",
        "finnish",
        "indonesian",
        "korean",
        "russian",
        "swahili",
        "telugu",
    ]
    assert all(
        passage[-1] == question[-1] == answer[-1] == ":" for _, passage, question, answer in TYDIQA_WORDS.values()
    )


@pytest.mark.parametrize("broken", ['"Say.\\ud800"', "[" * 100_000])
def test_json_that_holds_no_text_is_refused(tmp_path, broken):
    file = tmp_path / "bbh-three-shot.json"
    file.write_text(f'{{"navigate": {broken}}}')
    with pytest.raises(TargetFormatError, match="bbh-three-shot"):
        read_targets("bbh", str(file))


def test_a_sharegpt_file_that_is_one_json_array_is_a_task(tmp_path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "task.json").write_text(json.dumps([{"conversations": turns, "subtask": "s"}] * 2, indent=1))
    examples = read_targets("messages", str(tmp_path / "task.json"))
    assert [(each.subtask, each.messages, each.completion) for each in examples] == [("s", user("a"), "b")] * 2
    assert len(read_evaluation("messages", str(tmp_path / "task.json"))) == 2
    (tmp_path / "task.json").write_text(json.dumps([{"conversations": turns}, 7]))
    with pytest.raises(TargetFormatError, match="wrong_type") as refused:
        read_targets("messages", str(tmp_path / "task.json"))
    assert refused.value.where.endswith("task.json, row 2")


def test_any_jsonl_with_messages_is_a_task(tmp_path):
    turns = [*user("a"), {"role": "assistant", "content": "b"}, *user("c"), {"role": "assistant", "content": "d"}]
    rows = [{"messages": turns, "subtask": "s"}, {"prompt": "e", "completion": "f"}, {"messages": turns[:2]}]
    file = write_text(tmp_path / "task.jsonl", "\n\n".join(map(json.dumps, rows)) + "\n")
    first, second, third = read_targets("messages", str(file))
    assert (first.subtask, first.messages, first.assistant_prefix, first.completion) == ("s", turns[:3], "", "d")
    assert (second.subtask, second.messages, second.completion) == ("all", user("e"), "f")
    assert third.completion == "b"
    assert_ids_are_of_the_whole_conversation([first, second, third])


# ---- targets: trouble ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "invalid_json"),
        ('{"messages": []}', "no turns"),
        ('{"messages": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "a"}]}', "last two turns"),
        ('{"prompt": " ", "completion": "b"}', "no text"),
        ('{"prompt": "a", "completion": "b", "subtask": 3}', "subtask"),
    ],
)
def test_a_bad_target_row_is_an_error_that_names_it(tmp_path, line, message):
    good = '{"prompt": "a", "completion": "b"}'
    file = write_text(tmp_path / "task.jsonl", f"{good}\n\n{line}\n")
    with pytest.raises(TargetFormatError, match=message) as caught:
        read_targets("messages", str(file))
    assert caught.value.where == f"{file}, row 3"


@pytest.mark.parametrize("format", ["bbh", "mmlu", "tydiqa", "gsm8k", "messages"])
def test_missing_files_are_an_error(tmp_path, format):
    with pytest.raises(TargetFormatError):
        read_targets(format, str(tmp_path / "nowhere"))
    with pytest.raises(TargetFormatError):
        read_evaluation(format, str(tmp_path / "nowhere"))


def test_an_unknown_format_lists_the_known_ones(tmp_path):
    with pytest.raises(TargetFormatError, match="bbh, mmlu, tydiqa, gsm8k, messages"):
        read_targets("squad", str(tmp_path))


@pytest.mark.parametrize(
    ("format", "name", "content"),
    [
        ("bbh", "bbh-three-shot.json", "{}"),
        ("bbh", "bbh-three-shot.json", '{"s": "Task.\\n\\nQ: a\\nA: b\\n\\nQ: c"}'),
        ("bbh", "bbh-three-shot.json", '{"s": "Q: a\\nA: b\\n\\nQ: c\\nA: d\\n\\nQ: e\\nA: f\\nA: g"}'),
        ("bbh", "bbh-three-shot.json", "[]"),
        ("bbh", "bbh-three-shot.json", "not json"),
        ("mmlu", "x_dev.csv", ""),
        ("mmlu", "x_dev.csv", "q,a,b,c,d\n"),
        ("mmlu", "x_dev.csv", "q,a,b,c,d,E\n"),
        ("mmlu", "x_dev.csv", "q,a,b,c,d,\n"),
        ("mmlu", "x_dev.csv", "q,a,b,c,d,AB\n"),
        ("tydiqa", "tydiqa-one-shot.json", "{}"),
        ("tydiqa", "tydiqa-one-shot.json", '{"klingon": []}'),
        ("tydiqa", "tydiqa-one-shot.json", '{"english": []}'),
        ("tydiqa", "tydiqa-one-shot.json", '{"english": [{"context": "a", "question": "b", "answers": []}]}'),
        ("gsm8k", "cot-8-shot.json", "[]"),
        ("gsm8k", "cot-8-shot.json", '[{"question": "a"}]'),
        ("messages", "task.jsonl", ""),
        ("messages", "task.jsonl", "\n\n"),
    ],
)
def test_files_that_do_not_fit_are_an_error_that_names_them(tmp_path, format, name, content):
    file = write_text(tmp_path / name, content)
    with pytest.raises(TargetFormatError) as caught:
        read_targets(format, str(file if format == "messages" else tmp_path))
    assert str(tmp_path) in caught.value.where


CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {}}]}
ASKED = [{"role": "user", "content": "2 + 2?"}, CALL, {"role": "tool", "content": "4", "name": "add"}]


def test_a_target_of_messages_keeps_tools_and_calls_before_its_answer(tmp_path):
    answer = {"role": "assistant", "content": "Four.", "weight": 1}
    masked = [ASKED[0], {**CALL, "weight": 0}, ASKED[2], answer]
    rows = [
        {"messages": [*ASKED, answer], "tools": [{"name": "add"}]},
        {"messages": [*ASKED, answer]},
        {"messages": masked},
    ]
    file = write_text(tmp_path / "task.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with_tools, without, masked_before = read_targets("messages", str(file))
    assert [turn["role"] for turn in with_tools.messages] == ["user", "assistant", "tool"]
    assert with_tools.completion == "Four."
    assert with_tools.tools == '[{"type":"function","function":{"name":"add"}}]'
    assert without.tools is None
    assert without.example_id != with_tools.example_id
    assert masked_before == without, "only the last turn carries loss, so that masks before it say nothing"
    assert read_evaluation("messages", str(file))[0].tools == with_tools.tools
    table = target_table([with_tools, without])
    assert targets_from_table(table) == [with_tools, without]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"reasoning_content": "two and two"}, "reasoning"),
        ({"tool_calls": CALL["tool_calls"]}, "tool_calls"),
        ({"weight": 0}, "train"),
    ],
)
def test_a_target_whose_last_turn_is_not_just_learned_text_is_an_error(tmp_path, more, said):
    first = [*ASKED[:1], {"role": "assistant", "content": "4"}, *ASKED[:1]]
    row = {"messages": [*first, {"role": "assistant", "content": "Four.", **more}]}
    file = write_text(tmp_path / "task.jsonl", json.dumps(row) + "\n")
    for read in (read_targets, read_evaluation):
        with pytest.raises(TargetFormatError, match=f"last turn of an example has {said}"):
            read("messages", str(file))


def test_a_table_of_targets_of_an_earlier_version_is_read(tmp_path):
    (target,) = read_targets("messages", str(write_text(tmp_path / "a.jsonl", '{"prompt": "a", "completion": "b"}\n')))
    earlier = pl.List(pl.Struct({"role": pl.String(), "content": pl.String()}))
    turns = pl.Series("messages", [target.messages], earlier)
    assert targets_from_table(target_table([target]).drop("tools").with_columns(turns)) == [target]


# ---- tables ----

text = st.text(st.characters(codec="utf-8"), max_size=8)
turns = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": text}), max_size=2)


@given(st.lists(st.builds(TargetExample, text, text, turns, text, text), max_size=3))
def test_targets_survive_their_table(examples):
    table = target_table(examples)
    assert table.schema == TARGET_SCHEMA
    assert targets_from_table(table) == examples


# ---- evaluation: golden prompts ----


def test_bbh_is_asked_with_three_worked_examples(tmp_path):
    write_json(tmp_path / "bbh-three-shot.json", BBH)
    write_json(tmp_path / "test" / "counting.json", {"examples": [{"input": "a a", "target": "2"}] * 3})
    questions = read_evaluation("bbh", str(tmp_path), 2)
    assert len(questions) == 2
    assert questions[0].messages == user("Count.\n\nQ: a\nA: 1\n\nQ: a b\nA: 2\n\nQ: a b c\nA: 3\n\nQ: a a")
    assert (questions[0].subtask, questions[0].assistant_prefix, questions[0].answers) == ("counting", "A:", ["2"])
    assert questions[0].completion == " So the answer is 2."
    bare = read_evaluation("bbh", str(tmp_path / "test"), few_shot=False)
    assert bare[0].messages == user("Count.\n\nQ: a a")


def test_a_bbh_subtask_without_worked_examples_is_an_error(tmp_path):
    write_json(tmp_path / "bbh-three-shot.json", BBH)
    write_json(tmp_path / "test" / "other.json", {"examples": [{"input": "a", "target": "b"}]})
    with pytest.raises(TargetFormatError, match="other"):
        read_evaluation("bbh", str(tmp_path))


def test_mmlu_is_asked_with_five_shots_and_four_choices(tmp_path):
    write_text(tmp_path / "dev" / "anatomy_dev.csv", DEV)
    write_text(tmp_path / "test" / "anatomy_test.csv", TEST)
    for path in (tmp_path, tmp_path / "test"):
        (question,) = read_evaluation("mmlu", str(path))
        assert question.messages == user(
            "The following are multiple choice questions (with answers) about  anatomy.\n\n"
            "What is 2 + 2?\nA. 3\nB. 4\nC. 5, or so\nD. 6\nAnswer: B\n\n"
            "A second one?\nA. w\nB. x\nC. y\nD. z\nAnswer: D\n\n"
            'What is 1.50 + NA?\nA. 1.50\nB. a "b"\nC. None\nD. nan\nAnswer:'
        )
    assert (question.assistant_prefix, question.answers, question.completion) == ("The answer is:", ["C"], " C")
    assert question.choices == (" A", " B", " C", " D")
    (bare,) = read_evaluation("mmlu", str(tmp_path), few_shot=False)
    assert bare.messages[0]["content"].startswith(
        "The following are multiple choice questions (with answers) about  anatomy.\n\nWhat is 1.50"
    )


def test_tydiqa_is_asked_with_one_shot_and_the_passage(tmp_path):
    write_json(tmp_path / "tydiqa-one-shot.json", ONE_SHOT)
    answers = [{"text": "Bob"}, {"text": "Bob"}, {"text": "Bobby"}]
    qas = [{"id": "english-1-0", "question": "Who?", "answers": answers}]
    paragraphs = [{"context": "Bob it is.", "qas": qas}]
    write_json(tmp_path / "dev" / "english_tydiqa_dev.json", {"data": [{"paragraphs": paragraphs}]})
    (question,) = read_evaluation("tydiqa", str(tmp_path))
    assert question.messages == user(
        "Answer the following question based on the information in the given passage.\n\n"
        "Passage: Ann owns the\nhouse.\nQuestion: Who owns it?\nAnswer: Ann\n\n"
        "Passage: Bob it is.\nQuestion: Who?\n"
    )
    assert (question.subtask, question.assistant_prefix) == ("english", "Answer:")
    assert (question.answers, question.completion) == (["Bob", "Bobby"], " Bob")


def test_gsm8k_is_asked_with_its_worked_examples(tmp_path):
    write_json(tmp_path / "cot-8-shot.json", EIGHT_SHOT)
    row = {"question": "1,000 and 80? ", "answer": "Add <<1000+80=1080>>1,080.\nDone.\n#### 1,080"}
    write_text(tmp_path / "test.jsonl", json.dumps(row) + "\n")
    for path in (tmp_path, tmp_path / "test.jsonl"):
        (question,) = read_evaluation("gsm8k", str(path))
        assert question.messages == user(
            "Answer the following questions.\n\n"
            "Question: Two and two?\nAnswer: 2 + 2 = 4. So the answer is 4.\n\n"
            "Question: Half of 8?\nAnswer: 8 / 2 = 4. So the answer is 4.\n\n"
            "Question: 1,000 and 80?"
        )
    assert (question.assistant_prefix, question.answers) == ("Answer:", ["1080"])
    assert question.completion == " Add 1,080.\nDone. So the answer is 1,080."
    (bare,) = read_evaluation("gsm8k", str(tmp_path), few_shot=False)
    assert bare.messages == user("Answer the following question.\n\nQuestion: 1,000 and 80?")


def test_held_out_messages_are_asked_as_they_stand(tmp_path):
    file = write_text(tmp_path / "held.jsonl", '{"prompt": "a", "completion": " b", "subtask": "s"}\n' * 2)
    first, second = read_evaluation("messages", str(file))
    assert (first.messages, first.answers, first.completion, first.metric) == (user("a"), [" b"], " b", "exact_match")
    assert first.example_id == second.example_id


# ---- other layouts of the same files ----


def write_layout(folder: Path) -> None:
    """LESS's `data/eval`, small: subjects in `dev/` and `test/`, TyDiQA's nine languages in one file."""
    write_json(folder / "bbh/bbh-three-shot.json", BBH)
    write_json(folder / "bbh/bbh/counting.json", {"examples": [{"input": "a a", "target": "2"}]})
    write_text(folder / "mmlu/dev/anatomy_dev.csv", DEV)
    write_text(folder / "mmlu/test/anatomy_test.csv", TEST)
    write_json(folder / "tydiqa/dev/tydiqa-one-shot.json", ONE_SHOT)
    questions = [
        {"id": "korean-7-0", "question": "누구?", "answers": [{"text": "봅"}]},
        {"id": "english-1-0", "question": "Who?", "answers": [{"text": "Bob"}, {"text": "Bobby"}]},
    ]
    articles = [{"paragraphs": [{"context": "Bob it is.", "qas": [each]}]} for each in questions]
    write_json(folder / "tydiqa/dev/tydiqa-goldp-v1.1-dev.json", {"data": articles})
    write_json(folder / "gsm8k/cot-8-shot.json", EIGHT_SHOT)
    write_text(folder / "gsm8k/test.jsonl", json.dumps({"question": "1 + 1?", "answer": "Two.\n#### 2"}) + "\n")


@pytest.mark.parametrize("format", ["bbh", "mmlu", "tydiqa", "gsm8k"])
def test_the_layout_of_less_data_is_read_unpacked_and_inside_its_archive(tmp_path, format):
    write_layout(tmp_path / "data/eval")
    archive = shutil.make_archive(str(tmp_path / "less-data"), "zip", tmp_path, "data")
    local, packed = str(tmp_path / "data/eval" / format), f"zip://data/eval/{format}::{archive}"
    targets, questions = read_targets(format, local), read_evaluation(format, local)
    assert targets
    assert questions
    assert read_targets(format, packed) == targets
    assert read_evaluation(format, packed) == questions


def test_tydiqas_one_file_of_all_languages_is_asked_in_each_language(tmp_path):
    write_layout(tmp_path)
    file = tmp_path / "tydiqa/dev/tydiqa-goldp-v1.1-dev.json"
    korean, english = read_evaluation("tydiqa", str(file), shots_path=str(file.with_name("tydiqa-one-shot.json")))
    assert (korean.subtask, korean.assistant_prefix, korean.answers) == ("korean", "답변:", ["봅"])
    assert (english.subtask, english.assistant_prefix, english.answers) == ("english", "Answer:", ["Bob", "Bobby"])


def test_the_hubs_parquet_files_ask_the_same_as_the_published_ones(tmp_path):
    published, hub = tmp_path / "published", tmp_path / "hub"
    write_layout(published)

    def write_parquet(name: str, rows: list[dict]) -> None:
        (hub / name).parent.mkdir(parents=True, exist_ok=True)
        pl.DataFrame(rows).write_parquet(hub / name)

    def subject_rows(text: str, answers: list[int]) -> list[dict]:
        rows = csv.reader(text.splitlines())
        return [
            {"question": row[0], "subject": "anatomy", "choices": row[1:5], "answer": answer}
            for row, answer in zip(rows, answers, strict=True)
        ]

    write_parquet("mmlu/all/dev-00000-of-00001.parquet", subject_rows(DEV, [1, 3]))
    write_parquet("mmlu/all/test-00000-of-00001.parquet", subject_rows(TEST, [2]))
    write_parquet("bbh/counting/test-00000-of-00001.parquet", [{"input": "a a", "target": "2"}])
    write_parquet("gsm8k/main/test-00000-of-00001.parquet", [{"question": "1 + 1?", "answer": "Two.\n#### 2"}])
    asked = [("korean-7-0", "누구?", ["봅"]), ("english-1-0", "Who?", ["Bob", "Bobby"])]
    write_parquet(
        "tydiqa/secondary_task/validation-00000-of-00001.parquet",
        [
            {"id": name, "context": "Bob it is.", "question": question, "answers": {"text": texts}}
            for name, question, texts in asked
        ],
    )
    shots = {format: str(published / format) for format in ("bbh", "mmlu", "tydiqa", "gsm8k")}
    for format, folder in {"bbh": "bbh", "tydiqa": "tydiqa", "gsm8k": "gsm8k", "mmlu": "mmlu/all"}.items():
        expected = read_evaluation(format, str(published / format), shots_path=shots[format])
        assert read_evaluation(format, str(hub / folder), shots_path=shots[format]) == expected
    assert read_targets("mmlu", str(hub / "mmlu/all")) == read_targets("mmlu", str(published / "mmlu"))
    assert read_evaluation("mmlu", str(hub / "mmlu/all")) == read_evaluation("mmlu", str(published / "mmlu"))

    write_parquet("bad/test-0.parquet", [{"question": "q", "subject": "s", "choices": ["a", "b"], "answer": 1}])
    with pytest.raises(TargetFormatError, match="four `choices`") as caught:
        read_evaluation("mmlu", str(hub / "bad"), few_shot=False)
    assert caught.value.where.endswith("test-0.parquet, row 1")


# ---- the real files ----


@needs_tasks
@pytest.mark.parametrize(
    ("format", "subtasks", "examples", "different"),
    # Three logical_deduction and three tracking_shuffled_objects subtasks share their worked examples; one question of
    # MMLU's college_physics stands there twice.
    [("bbh", 27, 81, 69), ("mmlu", 57, 285, 284), ("tydiqa", 9, 9, 9), ("gsm8k", 1, 8, 8)],
)
def test_the_published_targets_are_all_there(format, subtasks, examples, different):
    targets = read_targets(format, str(TASKS / format))
    assert len({each.subtask for each in targets}) == subtasks
    assert len(targets) == examples
    assert len({each.example_id for each in targets}) == different
    assert all(each.messages[-1]["role"] == "user" and each.completion.strip() for each in targets)


@needs_tasks
@pytest.mark.parametrize(
    ("format", "subtasks", "questions"),
    [("bbh", 27, 27 * 60), ("mmlu", 57, 57 * 30), ("tydiqa", 9, 9 * 40), ("gsm8k", 1, 400)],
)
def test_the_evaluation_files_are_read_completely(format, subtasks, questions):
    read = read_evaluation(format, str(TASKS / format))
    assert len({each.subtask for each in read}) == subtasks
    assert len(read) >= questions
    assert len(read_evaluation(format, str(TASKS / format), 3)) == 3 * subtasks
    # The reference text, taken as if a model had said it, gets full marks.
    for each in read:
        rule = RULES[each.metric]
        grades = rule.grade(rule.extract(each.completion), each.answers)
        assert set(grades.values()) == {1.0}, each
