"""The table of strategies: what each way to choose rows is called, reads and takes from the project file.

Belongs here: plain data, one entry a strategy. How a strategy scores rows is the function that its entry names.

How to add one: CONTRIBUTING.md.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Strategy:
    """A way to choose rows.

    Attributes:
        name: As the project file writes it.
        chooses: What it chooses, in a few words for the reference page.
        function: Where it is computed: `module:function` in `less_assets.method.selection`; None: nothing to compute.
        ranks_by: Where stored scores of text or embeddings become those that it ranks by, in the same notation: called
            with scores (n,), `pool`, the whole pool's scores, and its own keys by name; None: they are those.
        scores: Scores of the pool that it ranks by; None: it ranks by none.
        keys: Keys of a recipe that only some strategies read, this one among them.
        has_budget: Whether it chooses a part of the pool: then it takes a budget and `quotas`.
        same_for_every_task: Whether all tasks get the same subset.
    """

    name: str
    chooses: str
    function: str | None
    scores: Literal["influence", "text", "embeddings", "tuning", "external"] | None = None
    keys: tuple[str, ...] = ()
    has_budget: bool = True
    same_for_every_task: bool = False
    ranks_by: str | None = None

    @property
    def holds_tournament(self) -> bool:
        """Whether it chooses among other recipes, by what a model trained on a part of their budget loses."""
        return "pilot" in self.keys

    @property
    def draws(self) -> bool:
        """Whether it draws at random: one recipe key for each seed."""
        return "seeds" in self.keys and not self.holds_tournament

    @property
    def chooses_rows(self) -> bool:
        """Whether it chooses rows to train on; otherwise it stands for the base model."""
        return self.function is not None

    @property
    def draws_by_length(self) -> bool:
        """Whether it draws rows that are as long as others: it needs the pool's lengths in tokens."""
        return "match" in self.keys

    @property
    def has_subtasks(self) -> bool:
        """Whether a row has a score for each subtask (`rds`: each target example), to be aggregated."""
        return "aggregate" in self.keys

    @property
    def matchable(self) -> bool:
        """Whether `length_matched` may imitate its selection: it ranks by a score and draws nothing."""
        return self.scores is not None and not self.draws

    @property
    def prefilters(self) -> bool:
        """Whether a prefilter may rank by it: it scores without gradients and without a file, and draws nothing."""
        return self.scores not in (None, "influence", "external") and not self.draws

    def load(self) -> Callable[..., Any]:
        """The function that `function` names."""
        assert self.function is not None
        return _load(self.function)

    def load_ranks_by(self) -> Callable[..., Any] | None:
        """The function that `ranks_by` names."""
        return None if self.ranks_by is None else _load(self.ranks_by)

    def reads(self, key: str) -> bool:
        """Whether a recipe of this strategy may state a key that some strategies only read."""
        return self.has_budget and not self.holds_tournament if key == "quotas" else key in self.keys


def _load(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(f"less_assets.method.selection.{module}"), function)
    return loaded


_LESS_KEYS = ("form", "subtask", "aggregate", "precondition", "damping", "rescore", "candidates", "near_duplicates")
# fmt: off
_ENTRIES = (
    Strategy("less", "rows whose training step lowers the targets' loss", "influence:score_shard", "influence",
             _LESS_KEYS),
    Strategy("random", "at random", "selection:select_at_random", None, ("seeds",), same_for_every_task=True),
    Strategy("full", "the whole pool", "selection:select_all", has_budget=False, same_for_every_task=True),
    Strategy("none", "nothing: the base model", None, has_budget=False, same_for_every_task=True),
    Strategy("bm25", "rows that share rare words with the targets", "baselines:bm25", "text", ("aggregate",)),
    Strategy("dsir", "rows whose n-grams are the targets'", "baselines:dsir", "text", ("seeds",)),
    Strategy("rds", "rows whose hidden states are near the targets' (RDS+)", "baselines:rds", "embeddings",
             ("aggregate",)),
    Strategy("perplexity", "the middle or the top of the base model's perplexity", "baselines:perplexity",
             "embeddings", ("keep",), same_for_every_task=True, ranks_by="baselines:perplexity_scores"),
    Strategy("target_tuned", "rows whose loss falls most when the base model is trained on the targets",
             "target_tuning:relative_falls", "tuning"),
    Strategy("length_matched", "at random, as long as another recipe's rows or the targets",
             "baselines:length_matched_log_weights", None, ("match", "seeds")),
    Strategy("external", "the rows that a file scores highest", "external:scores_of_rows", "external", ("scores",)),
    Strategy("tournament", "as the recipe does whose small trial beats random's and the others'", "tournament:choose",
             None, ("candidates", "pilot", "seeds")),
)
# fmt: on
STRATEGIES = {strategy.name: strategy for strategy in _ENTRIES}
"""Every strategy by its name, in the order of the documentation."""
STRATEGY_KEYS = (*dict.fromkeys(key for strategy in _ENTRIES for key in strategy.keys), "quotas")
"""Keys of a recipe that only some strategies read."""


def readers(key: str) -> str:
    """The strategies that read a recipe key, for documentation: "`less`, `bm25`"."""
    return ", ".join(f"`{name}`" for name, strategy in STRATEGIES.items() if strategy.reads(key))
