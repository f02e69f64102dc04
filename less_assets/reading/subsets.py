"""The subsets that recipes have selected, as they stand: what a report compares with.

Belongs here: finding them, and what a prefilter has left of them. What they hold is read by whoever shows it.
"""

from less_assets.lineage.lineage import Lineage
from less_assets.project.project import Project
from less_assets.store.artifacts import Pointer


def chooses_rows(project: Project, recipe: str) -> bool:
    """Whether a recipe chooses rows, so that there is something to report: not the whole pool, and not none."""
    return project.recipe(recipe).traits.has_budget


def other_subsets(lineage: Lineage, recipe: str, task: str) -> dict[str, Pointer]:
    """The subsets that other recipes last selected for a task, by recipe key; up to date or not."""
    folder = lineage.declarations["selected_subset"].folder
    others = [key for key in lineage.project.recipe_keys if key != recipe and chooses_rows(lineage.project, key)]
    pointers = {key: lineage.store.pointer(folder.format(recipe=key, task=task)) for key in others}
    return {key: pointer for key, pointer in pointers.items() if pointer is not None}


def recall_in_words(lineage: Lineage, partition: str) -> str | None:
    """How much of a selection a prefilter has left, by its estimate; None where there is none.

    Args:
        lineage: Reads `selected_subset`.
        partition: `recipe|task`.
    """
    subset = lineage.summary("selected_subset", partition)
    if "recall" not in subset:
        return None
    estimate, low, high = (f"{100 * subset[name]:.0f}" for name in ("recall", "recall_low", "recall_high"))
    return (
        f"The prefilter left about {estimate} % ({low} to {high} %) of the rows that the whole pool's gradients select."
    )
