"""What `less-assets check` finds: every problem of a project file and of the data it names, and what is worth a look.

Belongs here: putting the checks together, and their answer for programs. The checks themselves are
`project/data_check.py` and `pool_counts.py`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from less_assets.errors import LessAssetsError, ProjectFileError
from less_assets.inspection.pool_counts import encode_sample
from less_assets.project.data_check import (
    check_data,
    few_logged_rates,
    few_warmup_steps,
    skipped_files,
    unknown_excluded,
    unknown_keys_in_words,
)
from less_assets.project.project import Project, load_project
from less_assets.project.yaml_file import Problem


@dataclass(frozen=True)
class CheckedProject:
    """A project whose file could be read, and what was found.

    Attributes:
        project: The project.
        problems: What keeps it from being run.
        notes: What is worth a look, in words.
        sample: Counts of a sample of the pool, as the model reads it; None where it could not be encoded.
    """

    project: Project
    problems: Sequence[Problem]
    notes: Sequence[str]
    sample: dict[str, Any] | None


def check_project(path: Path) -> CheckedProject:
    """Look at a project file and at the data it names; changes nothing.

    Raises:
        LessAssetsError: The project file itself cannot be used.
    """
    project = load_project(path)
    unknown: dict[str, Counter[str]] = {}
    problems, sample = check_data(project, unknown), None
    if not problems:
        problems, sample = encode_sample(project)
    notes = (*skipped_files(project), *unknown_keys_in_words(unknown), *unknown_excluded(project))
    notes += (*few_warmup_steps(project), *few_logged_rates(project))
    return CheckedProject(project, problems, notes, sample)


def verdict_as_data(checked: CheckedProject | LessAssetsError) -> dict[str, Any]:
    """The answer for programs: `project`, `usable`, `problems`, `notes`, `sample`; of an unusable project file, too."""
    if isinstance(checked, LessAssetsError):
        several = checked.problems if isinstance(checked, ProjectFileError) else ()
        problems: Sequence[LessAssetsError | Problem] = several or [checked]
        rest: dict[str, Any] = {"notes": [], "sample": None}
    else:
        problems = checked.problems
        rest = {"notes": list(checked.notes), "sample": checked.sample}
    project = checked.project.name if isinstance(checked, CheckedProject) else None
    named = [{"where": problem.where, "what": problem.what, "fix": problem.fix} for problem in problems]
    return {"project": project, "usable": not problems, "problems": named, **rest}
