"""The day of a chat template is a setting of what it changes, and of nothing else."""

import datetime

import pytest

from less_assets.errors import ProjectFileError
from less_assets.lineage.model_versions import model_stamp
from less_assets.method.training.files import folder_digest
from less_assets.method.training.models import find_base
from less_assets.project.model_files import template_writes_day
from less_assets.project.project import load_project

ASKS = "{{ strftime_now('%Y') }}{{ messages[0].content }}"
PROJECT = """
name: p
model: {{base: {base}{more}}}
pool: {{sources: [{{name: s, path: s.jsonl}}]}}
warmup: {{fraction: 0.5}}
tasks: [{{name: t, examples: {{path: t.jsonl}}}}]
recipes: [{{name: full, strategy: full}}, {{name: other, strategy: full, model: ./other}}]
"""


@pytest.fixture
def folder(tmp_path):
    """A model whose template asks for the day, beside another whose template does not."""
    for name, template in (("model", ASKS), ("other", "{{ messages[0].content }}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chat_template.jinja").write_text(template)
    return tmp_path


def project(folder, base="./model", more=""):
    path = folder / "project.yaml"
    path.write_text(PROJECT.format(base=base, more=more))
    return load_project(path)


def test_a_template_asks_for_the_day_wherever_it_stands(folder, monkeypatch):
    assert template_writes_day(str(folder / "model")) is True
    assert template_writes_day(str(folder / "other")) is False
    assert template_writes_day("owner/name") is None
    inside = folder / "other/additional_chat_templates"
    inside.mkdir()
    (inside / "tool_use.jinja").write_text(ASKS)
    assert template_writes_day(str(folder / "other")) is True
    (folder / "model/chat_template.jinja").unlink()
    (folder / "model/tokenizer_config.json").write_text('{"chat_template": "{{ strftime_now(\'%Y\') }}"}')
    assert template_writes_day(str(folder / "model")) is True
    package = folder / "packaged_for_day"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.gguf").write_bytes(b"GGUF" + b"\0" * 100 + ASKS.encode())
    monkeypatch.syspath_prepend(folder)
    assert template_writes_day("gguf:packaged_for_day/a.gguf") is True
    assert template_writes_day("gguf:packaged_for_day/b.gguf") is False


def test_the_day_is_a_setting_where_the_template_asks_for_it(folder):
    assert project(folder).model_settings()["date"] == "2025-01-01"
    assert project(folder, more=", date: 2026-03-04").model_settings()["date"] == "2026-03-04"
    assert project(folder, more=", date: '2026-03-04'").finetuning_settings("full")["model"]["date"] == "2026-03-04"
    assert "date" not in project(folder, more=", date: 2026-03-04").finetuning_settings("other")["model"]
    assert "date" not in project(folder, "./other", ", date: 2026-03-04").model_settings()
    assert "date" not in project(folder, more=", chat_format: tulu").model_settings()
    # Of a model that has to be fetched nobody knows; a day that was chosen counts.
    assert "date" not in project(folder, "owner/name").model_settings()
    assert project(folder, "owner/name", ", date: 2026-03-04").model_settings()["date"] == "2026-03-04"
    assert project(folder, more=", date: 2026-03-04").model.date == datetime.date(2026, 3, 4)


def test_what_is_no_day_is_refused(folder):
    with pytest.raises(ProjectFileError, match="must be a date such as"):
        project(folder, more=", date: today")


@pytest.mark.parametrize("file", ["tokenization_own.py", "source.spm"])
def test_a_models_own_code_counts_where_it_is_run_and_every_tokenizers_files_always(folder, file):
    model = folder / "model"
    before = [find_base(str(model), folder, trust_remote_code=trusted).digest for trusted in (False, True)]
    (model / file).write_text("changed")
    after = [find_base(str(model), folder, trust_remote_code=trusted).digest for trusted in (False, True)]
    assert [old != new for old, new in zip(before, after, strict=True)] == [file.endswith(".spm"), True]


@pytest.mark.parametrize("file", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer.json"])
def test_templates_and_tokenizer_are_part_of_the_model(folder, file):
    path = folder / "model" / file
    before = folder_digest(folder / "model"), model_stamp(str(folder / "model"))
    path.parent.mkdir(exist_ok=True)
    path.write_text("changed")
    after = folder_digest(folder / "model"), model_stamp(str(folder / "model"))
    assert before[0] != after[0]
    assert before[1] != after[1]
