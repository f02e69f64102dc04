"""The form of an asset: what it is made from, and also what it computes, says of itself and costs.

Belongs here: the fields. The assets stand in the other modules of this room, `registry.py` lists them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from less_assets.compute.models import ModelLoader
from less_assets.compute.speeds import Guess
from less_assets.compute.step import Compute, ComputeTogether, Log
from less_assets.compute.workload import Amount, Workload
from less_assets.lineage.lineage import Declaration, Keys, Lineage
from less_assets.project.project import Project
from less_assets.steps.shown import Describe, Verdict, only_figures

ROW_COLUMNS = {"example_id": ["example_id"], "source": ["source"]}
"""What rows of the pool keep of it, for `Asset.columns_from`."""
CountWork = Callable[[Workload, Sequence[str]], Amount]
"""Work of some partitions of an asset that are not stored yet."""


@dataclass(frozen=True)
class Check:
    """A check that a person should see; it warns and stops nothing.

    Attributes:
        name: Name of the check.
        description: What holds if it passes.
        judge: Looks at a partition (empty for an unpartitioned asset): lineage, key, what loads models, what receives
            lines.
        loads_model: Whether it takes the place of an asset that loads a model.
        explains: Whether `less-assets run` makes it after the models, as it does assets that explain. Only checks of
            assets that are made in ranges can wait.
        needed_by: Which projects it exists in.
    """

    name: str
    description: str
    judge: Callable[[Lineage, str, ModelLoader, Log], Verdict]
    loads_model: bool = False
    explains: bool = False
    needed_by: Callable[[Project], bool] = lambda project: True


@dataclass(frozen=True, kw_only=True)
class Asset(Declaration):
    """An asset of the graph.

    Attributes:
        group: Its group in Dagster's UI.
        kinds: Its kinds in Dagster's UI.
        description: What it holds, in a sentence.
        compute: Makes one partition; a module-level function, so that another process finds it by name.
        compute_together: Makes several partitions by one computation; instead of `compute`.
        before: Called before each materialization, also of what is stored already; raises to refuse it.
        describe: What is shown of an artifact besides the figures of its summary.
        leads_to_reports: Whether its description in Dagster's UI leads to the reports of all recipes and tasks.
        checks: Its checks.
        in_ranges: Whether one Dagster run makes several partitions, each kept as it finishes.
        loads_model: Whether it loads a model: one such asset runs at a time by default.
        spread: Whether its partitions may be made by the workers of a cluster.
        explains: Whether nothing is made from it: a run comes to it last.
        automatic: Whether Dagster may make it by itself as soon as it is missing or stale: settings and small files.
        same_run: Asset of the same partition that the same Dagster run goes on with, if it was never made.
        amount: Counts the work of partitions; None: too little to count.
        passes: Times that a token of its work goes through the model forward or back, where it is part of a selection
            or a training: 1, or 2 with gradients; 0: it is neither.
        counts_tokens: Whether its work is counted in tokens.
        speed: What serves where its speed was not measured.
        versioned_by_content: Whether its data version tells its content, so that equal content has one version whatever
            it was made from; else it tells what it was made from.
        rehearsal_seconds: About how long a partition takes, where that is so short that a plan makes it to know its
            content, in a folder that is thrown away; 0: it needs no file of its inputs. None, of the field or of a
            partition: a plan never makes it.
        known_figures: Figures of the summary that are known before a partition is made.
        columns_from: Upstream asset -> column -> the upstream columns that it is made from; names in braces stand for
            the project's (with the axis `recipe`: the recipe's) direction forms, subtask rules and checkpoints.
    """

    group: str
    kinds: frozenset[str]
    description: str
    compute: Compute | None = None
    compute_together: ComputeTogether | None = None
    before: Callable[[Lineage], None] | None = None
    describe: Describe = only_figures
    leads_to_reports: bool = False
    checks: tuple[Check, ...] = ()
    in_ranges: bool = False
    loads_model: bool = False
    spread: bool = False
    explains: bool = False
    automatic: bool = False
    same_run: str | None = None
    amount: CountWork | None = None
    passes: int = 0
    counts_tokens: bool = False
    speed: Guess = field(default_factory=Guess)
    versioned_by_content: bool = False
    rehearsal_seconds: Callable[[Lineage, Keys], float | None] | None = None
    known_figures: Callable[[Lineage, Keys], Mapping[str, JsonValue]] = lambda lineage, keys: {}
    columns_from: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)

    def checks_in(self, project: Project) -> list[Check]:
        """Its checks that a project has."""
        return [check for check in self.checks if check.needed_by(project)]
