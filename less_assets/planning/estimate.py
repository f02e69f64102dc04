"""What a run would cost: the work that is missing, multiplied by measured speeds, calibrated where none is known.

Belongs here: putting work and speeds together for `less-assets plan`. What is missing finds `rehearsal.py`; amounts are
`compute/workload.py`, measured speeds `compute/speeds.py`, the trials `trials.py`.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from less_assets.compute import speeds as stored_rates
from less_assets.compute.models import ModelLoader
from less_assets.compute.speeds import MODEL_LOAD, TRAINING, Rate, Rates, rate_name
from less_assets.compute.workload import Amount, Workload
from less_assets.lineage.lineage import Lineage, Status
from less_assets.planning.cost_ratio import CostRatio, cost_ratios
from less_assets.planning.rehearsal import Rehearsal, rehearse
from less_assets.project.project import Project
from less_assets.project.task_sections import Task
from less_assets.project.warmup_steps import few_steps, steps_of
from less_assets.reading.certificates import CERTIFICATES
from less_assets.reading.rows import few_warmup_steps
from less_assets.running.request import Partition, Request
from less_assets.steps.certificates import certificate_work
from less_assets.steps.registry import ASSETS, GUESSES

if TYPE_CHECKING:
    from less_assets.running.runner import GraphRunner

GRADIENT_SECONDS, TRAINING_SECONDS, ASKING_SECONDS = 10.0, 12.0, 20.0
"""Limits of the trials: with loading a small model, under a minute."""


@dataclass(frozen=True)
class AssetEstimate:
    """One line of the plan.

    Attributes:
        asset: Name; or `CERTIFICATES`.
        statuses: Status of every partition that the request needs, when its turn comes in the run.
        perhaps: Partitions that are due only if something they are made from turns out to have changed.
        amount: The missing work, theirs included; None if nothing is due.
        seconds: Its time; None where a speed is not known.
    """

    asset: str
    statuses: Mapping[Partition, Status]
    perhaps: frozenset[Partition]
    amount: Amount | None
    seconds: float | None

    @property
    def due(self) -> int:
        """Artifacts to make, at most."""
        return sum(status.state != "fresh" for status in self.statuses.values())


@dataclass(frozen=True)
class Estimate:
    """The whole plan.

    Attributes:
        assets: In the order of the run.
        measured: Names of the speeds that earlier runs have measured, of those that were used.
        similar: Names of those that runs with other settings of adapter and gradients have measured.
        calibrated: Names of those that a short trial has.
        unknown: Names of those that nobody knows, whose work is left out of the time.
        ratios: What each recipe's fine-tuning costs against its selection, if models are trained.
        few_warmup_steps: What to say of a warm-up with too few steps; None if they suffice, or none is needed.
    """

    assets: list[AssetEstimate]
    measured: list[str]
    similar: list[str]
    calibrated: list[str]
    unknown: list[str]
    ratios: list[CostRatio]
    few_warmup_steps: str | None

    @property
    def due(self) -> int:
        """Artifacts to make, at most."""
        return sum(asset.due for asset in self.assets)

    @property
    def perhaps(self) -> int:
        """How many of them only a change of content makes due, which nobody knows before."""
        return sum(len(asset.perhaps) for asset in self.assets)

    @property
    def seconds(self) -> float:
        """Time of everything whose speed is known."""
        return sum(asset.seconds or 0 for asset in self.assets)

    @property
    def tokens(self) -> float:
        """Tokens through the model."""
        return sum(asset.amount.tokens for asset in self.assets if asset.amount)

    @property
    def bytes(self) -> float:
        """Bytes written."""
        return sum(asset.amount.bytes or 0 for asset in self.assets if asset.amount)


def nothing_due(lineage: Lineage, partitions: Mapping[str, Sequence[Partition]]) -> Estimate:
    """The plan of a request whose artifacts are all fresh.

    Args:
        lineage: Knows what is stored.
        partitions: Asset -> partitions that the request needs, in the order of the run.
    """
    lines = [
        AssetEstimate(asset, dict.fromkeys(keys, Status("fresh")), frozenset(), None, None)
        for asset, keys in partitions.items()
    ]
    few = few_warmup_steps(lineage) if "warmup_checkpoints" in partitions else None
    return Estimate(lines, [], [], [], [], ratios=[], few_warmup_steps=few)


def estimate(
    runner: "GraphRunner",
    lineage: Lineage,
    models: ModelLoader,
    request: Request,
    *,
    calibrate: bool,
    log: Callable[[str], object],
) -> Estimate:
    """What a request would make, how much work that is, and how long it takes on this machine.

    Args:
        runner: Knows what the request needs.
        lineage: The plans and what is stored.
        models: Loads tokenizer and model; the model only for a calibration.
        request: What a person asked for.
        calibrate: Measure speeds that are not known, on the real model; their results are kept.
        log: Receives a line before something takes long.

    Raises:
        LessAssetsError: Data or model cannot be read.
    """
    with rehearse(runner, lineage, models, request) as rehearsal:
        rates = Rates.load(lineage.store, lineage.project, GUESSES)
        work = Workload(rehearsal.lineage, models)
        unknown = _unknown(rates, rehearsal.computed, lineage.project)
        if calibrate and unknown:
            log(f"measuring the speed of {', '.join(sorted(unknown))}: up to a minute")
            measured = calibration(lineage.project, models, work, unknown)
            stored_rates.keep_calibrated(lineage.store, lineage.project, measured)
            rates = rates.with_calibrated(measured)
        lines = []
        for asset, statuses in rehearsal.statuses.items():
            amount = _amount(work, asset, rehearsal, runner)
            seconds = amount.seconds(rates) if amount else None
            lines.append(AssetEstimate(asset, statuses, rehearsal.perhaps[asset], amount, seconds))
        sources = _sources(rates, [line.amount for line in lines if line.amount])
        ratios = cost_ratios(work, rehearsal.lineage, models, rehearsal.statuses.get("finetuned_model", ()))
        few_steps = _few_warmup_steps(work) if "warmup_checkpoints" in rehearsal.statuses else None
    return Estimate(lines, **sources, ratios=ratios, few_warmup_steps=few_steps)


def _few_warmup_steps(work: Workload) -> str | None:
    warmup, last = work.project.warmup, work.project.checkpoints[-1]
    if warmup.imported:
        known = work.known("warmup_checkpoints", last, "step")
        return few_steps(warmup, known, None) if known else None
    rows = round(work.sampled_rows)
    return few_steps(warmup, steps_of(warmup, rows), rows)


def _amount(work: Workload, asset: str, rehearsal: Rehearsal, runner: "GraphRunner") -> Amount | None:
    """Work of what is due of an asset; None if nothing is."""
    if not (due := rehearsal.due(asset)):
        return None
    if asset == CERTIFICATES:
        return replace(certificate_work(work, rehearsal.computed), runs=len(due), artifacts=len(due))
    computed, counted = list(map(str, rehearsal.computed[asset])), ASSETS[asset].amount
    amount = counted(work, computed) if counted and computed else Amount()
    return replace(amount, runs=len(runner.runs(asset, due)), artifacts=len(due))


def _sources(rates: Rates, amounts: Sequence[Amount]) -> dict[str, list[str]]:
    names = {name for amount in amounts for name, units in amount.units.items() if units} - {
        name for name, guess in GUESSES.items() if guess.seconds is not None
    }
    known = {name: rates.get(name) for name in sorted(names)}
    return {
        **{
            source: [name for name, rate in known.items() if rate and rate.source == source]
            for source in ("measured", "similar", "calibrated")
        },
        "unknown": [name for name, rate in known.items() if rate is None],
    }


def _unknown(rates: Rates, computed: Mapping[str, Sequence[Partition]], project: Project) -> set[str]:
    """Speeds that the missing work needs, nobody has measured with these settings, and a calibration can."""
    needed = {asset for asset, partitions in computed.items() if partitions} - {"eval_results"}
    needed &= {"base_model", "influence_scores", *(name for name, asset in ASSETS.items() if asset.counts_tokens)}
    needed |= {
        rate_name("eval_results", key)
        for key in computed.get("eval_results", [])
        if any(_can_ask(member) for member in project.member_tasks(str(key).partition("|")[2]))
    }
    if project.warmup.imported:
        needed.discard("warmup_checkpoints")
    return {name for name in needed if (rate := rates.get(name)) is None or rate.source == "similar"}


def _can_ask(task: Task) -> bool:
    return task.evaluation is not None and task.evaluation.harness is None


def calibration(project: Project, models: ModelLoader, work: Workload, unknown: set[str]) -> dict[str, Rate]:
    """Measure the speeds of some names on the real model and rows of the pool.

    The base model is fetched, and dequantised into the cache, if it is not there yet; nothing else is stored.
    """
    from less_assets.method.gradients.features import resolve_token_budget
    from less_assets.method.training.training import TrainingSettings
    from less_assets.planning import trials
    from less_assets.steps.warmup import lora_settings

    measured: dict[str, Rate] = {}
    started = time.perf_counter()
    models.describe_base(project.model.base)
    measured["base_model"] = Rate(time.perf_counter() - started, 1, "calibrated")
    model, tokenizer = models.base()
    measured[MODEL_LOAD] = Rate(models.loading_seconds, models.loads, "calibrated")
    rows = _mixed([sample.examples for sample in work.samples.values()])
    settings, gradients = TrainingSettings(**project.finetuning.training_values()), project.gradients
    with tempfile.TemporaryDirectory(prefix="less-assets-") as folder:
        trained = trials.try_training(
            model,
            tokenizer,
            rows,
            settings,
            Path(folder),
            lora=lora_settings(project),
            limit_seconds=TRAINING_SECONDS,
        )
    measured[TRAINING] = _calibrated(trained.speed)
    budget = gradients.token_budget or resolve_token_budget(
        trained.model,
        forms=gradients.forms,
        dimension=gradients.dimension,
        longest=max(len(row.input_ids) for row in rows),
        gradient_checkpointing=gradients.gradient_checkpointing,
    )
    measured["train_gradients"] = _calibrated(
        trials.try_gradients(
            trained,
            rows,
            forms=gradients.forms,
            sketch=gradients.sketch,
            dimension=gradients.dimension,
            token_budget=budget,
            pad_token_id=tokenizer.pad_token_id or 0,
            gradient_checkpointing=gradients.gradient_checkpointing,
            limit_seconds=GRADIENT_SECONDS,
        )
    )
    if "influence_scores" in unknown:
        measured["influence_scores"] = _calibrated(trials.try_scoring(gradients.dimension, gradients.storage, 8))
    tasks = [name.removeprefix("eval_results/") for name in unknown if name.startswith("eval_results/")]
    for task in tasks:
        measured[f"eval_results/{task}"] = _try_evaluation(
            project, task, trained.model, tokenizer, ASKING_SECONDS / len(tasks)
        )
    return measured


def _try_evaluation(project: Project, task: str, model: Any, tokenizer: Any, limit_seconds: float) -> Rate:
    from less_assets.method.evaluation.evaluation import evaluate_examples
    from less_assets.planning.trials import try_asking
    from less_assets.steps.evaluation import evaluation_settings
    from less_assets.steps.judging_examples import evaluation_examples

    members = [member for member in project.member_tasks(task) if _can_ask(member)]
    seconds = units = 0.0
    for member in members:
        asked = evaluation_settings(project, member)

        def ask(examples: Sequence[Any], asked: Any = asked) -> None:
            evaluate_examples(model, tokenizer, examples, asked)

        speed = try_asking(ask, evaluation_examples(member), limit_seconds / len(members))
        seconds, units = seconds + speed.seconds, units + speed.units
    return Rate(seconds, units, "calibrated")


def _mixed(samples: Sequence[Sequence[Any]]) -> list[Any]:
    """Rows of all sources in turn, those without loss tokens left out."""
    longest = max(map(len, samples), default=0)
    return [
        rows[number] for number in range(longest) for rows in samples if number < len(rows) and rows[number].loss_tokens
    ]


def _calibrated(speed: Any) -> Rate:
    return Rate(speed.seconds, speed.units, "calibrated")
