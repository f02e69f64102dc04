"""Grading on answers with known verdicts, the awkward ones included."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from less_assets.method.evaluation.answers import (
    RULES,
    last_number,
    normalize_as_less,
    normalize_plain,
    normalize_stated,
    short_answer,
    squad_f1,
    stated_answer,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes $18 every day.", "18"),
        ("The total is 1,080.50.", "1080.5"),
        ("It costs $ 2,000,000", "2000000"),
        ("16 - 3 - 4 = 9", "9"),
        ("16-3", "3"),
        ("x = -7", "-7"),
        ("a loss of -$7.25", "-7.25"),
        ("the change is −12 degrees", "-12"),
        ("18.0", "18"),
        ("018", "18"),
        ("-0", "0"),
        ("a quarter is .25", "0.25"),
        ("The answer is 42.", "42"),
        ("options 1,2,3", "3"),
        ("1,2345", "2345"),
        ("5 apples or 6% of them", "6"),
        ("#### 1,234", "1234"),
        ("no number at all", None),
        ("", None),
        ("$", None),
        (".", None),
    ],
)
def test_last_number_of_awkward_texts(text, number):
    assert last_number(text) == number


@given(st.integers(-(10**12), 10**12))
def test_last_number_reads_its_own_output_and_thousands_separators(value):
    assert last_number(f"so it is {value}") == str(value)
    assert last_number(f"so it is {value:,}.") == str(value)
    assert last_number(str(last_number(f"{value}.00"))) == str(value)


@given(st.text())
def test_extraction_never_fails_on_any_text(text):
    for rule in RULES.values():
        answer = rule.extract(text)
        assert all(0.0 <= score <= 1.0 for score in rule.grade(answer, ["42"]).values())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 3 = 6. So the answer is 6.", "6"),
        ("So the answer is (B).", "(B)"),
        ("So the answer is: (B)", "(B)"),
        ("so the answer is 3.5. Next", "3.5"),
        ("So the answer is True\nQ: another\nA: So the answer is False.", "True"),
        ("So the answer is A. No, wait. So the answer is B.", "A"),
        ("So the answer is ] ) ).", "] ) )"),
        ("The answer is yes", "yes"),
        ("I think it is (C)", "I think it is (C)"),
        ("So the answer is", ""),
        ("So the answer is .", ""),
        ("", ""),
    ],
)
def test_stated_answer_of_awkward_texts(text, answer):
    assert stated_answer(text) == answer


@pytest.mark.parametrize(
    ("rule", "output", "reference", "score"),
    [
        ("bbh", "… So the answer is (b).", "(B)", 1.0),
        ("bbh", "… So the answer is (A).", "(B)", 0.0),
        ("bbh", "So the answer is barn damp delmarva.", "barn damp delmarva", 1.0),
        ("bbh", "So the answer is ] ) ].", "] ) ]", 1.0),
        ("bbh", "So the answer is ] ] ].", "] ) ]", 0.0),
        ("bbh", "So the answer is 3.", "-3", 0.0),
        ("bbh", "So the answer is -3.", "-3", 1.0),
        ("bbh", "So the answer is −3.", "-3", 1.0),
        ("bbh", "So the answer is 15.", "1.5", 0.0),
        ("bbh", "So the answer is 1.5.", "1.5", 1.0),
        ("bbh", "So the answer is 1,5.", "15", 0.0),
        ("bbh", "So the answer is 1,500.", "1500", 1.0),
        ("bbh", "So the answer is [ ] )", "[ ] ]", 0.0),
        ("bbh", "So the answer is > ) }.", "> ) }", 1.0),
        ("bbh", "So the answer is ) }.", "> ) }", 0.0),
        ("bbh", "So the answer is [1].", "1", 0.0),
        ("bbh", "So the answer is **(B)**.", "(B)", 1.0),
        ("bbh", "**So the answer is (B).**", "(B)", 1.0),
        ("bbh", "So the answer is: **6.**", "6", 1.0),
        ("bbh", "**The answer is:** `True`", "True", 1.0),
        ("bbh", 'So the answer is "barn, damp, delmarva".', "barn damp delmarva", 1.0),
        ("bbh_as_less", "So the answer is 3.", "-3", 1.0),
        ("bbh_as_less", "So the answer is 15.", "1.5", 1.0),
        ("bbh_as_less", "So the answer is (A).", "(B)", 0.0),
        ("bbh_as_less", "So the answer is ] ] ].", "] ) ]", 0.0),
        ("exact_match", "**Paris.**", "Paris", 1.0),
        ("exact_match", "_Paris_.", "Paris", 1.0),
        ("exact_match", "`__init__`", "__init__", 1.0),
        ("exact_match", "**", "Paris", 0.0),
        ("exact_match", "**", "*", 0.0),
        ("exact_match", "-3", "3", 0.0),
        ("bbh", "", "No", 0.0),
        ("bbh", "No", "No", 1.0),
        ("gsm8k", "He has 1,000 - 20 = $980 left.", "#### 980", 1.0),
        ("gsm8k", "The answer is 980.00", "980", 1.0),
        ("gsm8k", "The answer is 98", "980", 0.0),
        ("gsm8k", "The answer is -980", "980", 0.0),
        ("gsm8k", "nothing", "0", 0.0),
        ("gsm8k", "", "0", 0.0),
        ("mmlu", " A", "A", 1.0),
        ("mmlu", " B", "A", 0.0),
        ("exact_match", " Paris.\n", "paris", 1.0),
        ("exact_match", "Paris\n\nAnd more", "Paris", 1.0),
        ("exact_match", "It is Paris", "Paris", 0.0),
        ("exact_match", "New   York", "new york", 1.0),
        ("exact_match", "...", "..", 0.0),
        ("exact_match", "", "Paris", 0.0),
        ("exact_match", "", "", 0.0),
        ("tydiqa", "the Kigali", "Kigali", 1.0),
        ("tydiqa", "", "Kigali", 0.0),
    ],
)
def test_verdicts(rule, output, reference, score):
    grades = RULES[rule].grade(RULES[rule].extract(output), [reference])
    assert next(iter(grades.values())) == score


def test_best_reference_counts():
    grades = RULES["tydiqa"].grade("Amos Wilfrid", ["Reid", "Amos and Wilfrid Ayre"])
    assert grades == {"f1": pytest.approx(2 * 1.0 * 0.5 / 1.5), "exact_match": 0.0}


def test_squad_f1_of_known_pairs():
    assert squad_f1("the cat sat", "a cat sat down") == pytest.approx(2 * 1.0 * (2 / 3) / (1 + 2 / 3))
    assert squad_f1("Кигали", "кигали.") == 1.0
    assert squad_f1("", "") == 0.0


def test_punctuation_only_answers_are_compared_as_they_are():
    assert normalize_stated("] ) ]") == "] ) ]"
    assert normalize_as_less("] ) ]") == "])]"
    assert normalize_as_less("(A)") == "a"


@given(st.text(alphabet="aB3 .,-−*_`()[]<>~\n"))
def test_normalizing_again_changes_nothing(text):
    for normalize in (normalize_plain, normalize_stated):
        assert normalize(normalize(text)) == normalize(text)


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6), st.sampled_from(["**{}**", "`{}`", "_{}_.", "{}"]))
def test_numbers_are_the_same_answer_only_if_they_are_equal(answer, reference, dressed):
    decimal = f"{answer / 10:.1f}"
    for rule in ("bbh", "exact_match"):
        grade = RULES[rule].grade(RULES[rule].extract(dressed.format(answer)), [str(reference)])
        assert grade == {"exact_match": float(answer == reference)}
        assert RULES[rule].grade(RULES[rule].extract(dressed.format(decimal)), [str(answer)])["exact_match"] == 0.0


def test_short_answer_ends_at_a_blank_line():
    assert short_answer("\n 12 \n \nQ: next") == "12"
