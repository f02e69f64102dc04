"""What `less-assets plan` says: a table for people, data for programs.

Belongs here: words. What is due, and what it costs, is `planning/`.
"""

import math
from collections.abc import Sequence
from typing import Any

from less_assets.compute.progress import counted, duration
from less_assets.inspection.text_table import text_table
from less_assets.planning.cost_ratio import ENOUGH, CostRatio
from less_assets.planning.estimate import AssetEstimate, Estimate


def print_plan(forecast: Estimate) -> None:
    """Print a plan as a table, with its sums and where its speeds come from."""
    headings = ("asset", "fresh", "to make", "tokens", "time", "bytes", "why")
    print(text_table([_plan_row(planned) for planned in forecast.assets], headings, right_aligned=range(1, 6)))
    if not forecast.due:
        print("\nnothing to do")
        _print_ratios(forecast.ratios)
        _print_warning(forecast)
        return
    if forecast.perhaps:
        print(
            f"\nat most {counted(forecast.due, 'artifact')} to make, {forecast.due - forecast.perhaps} of them "
            "certainly; `less-assets run` makes them.\nThe others are made only if something that they are made from "
            "turns out to have changed. Tokens, time and bytes are those of all."
        )
    else:
        print(f"\n{counted(forecast.due, 'artifact')} to make; `less-assets run` makes them")
    has_unknown = any(planned.amount and planned.seconds is None for planned in forecast.assets)
    bound = {(True, False): "at least", (False, True): "at most"}.get((has_unknown, forecast.perhaps > 0), "about")
    print(
        f"{bound} {duration(forecast.seconds)}; "
        f"{_count(forecast.tokens)} tokens through the model; {_count(forecast.bytes)}B"
    )
    for words, names in (
        ("speeds measured in earlier runs", forecast.measured),
        ("speeds measured with other settings of adapter or gradients", forecast.similar),
        ("speeds of a short trial", forecast.calibrated),
        ("speeds not known, left out of the time", forecast.unknown),
    ):
        if names:
            print(f"{words}: {', '.join(names)}")
    _print_ratios(forecast.ratios)
    _print_warning(forecast)


def _print_warning(forecast: Estimate) -> None:
    if forecast.few_warmup_steps:
        print(f"\nWarning: {forecast.few_warmup_steps}.")


def _print_ratios(ratios: Sequence[CostRatio]) -> None:
    """What fine-tuning costs against selecting, and what is cheaper where that is little."""
    if ratios:
        said = [f"{ratio.recipe} {'?' if ratio.ratio is None else _times(ratio.ratio)}" for ratio in ratios]
        print(f"\ncompute of fine-tuning ÷ compute of selecting: {', '.join(said)}")
    if unknown := [ratio.recipe for ratio in ratios if ratio.ratio is None]:
        print(f"?: the size of the model that {', '.join(unknown)} trains is not known before it is here")
    for ratio in ratios:
        if ratio.is_low:
            print(f"{ratio.recipe} is below {ENOUGH:.0f}. Cheaper: {'; '.join(_cheaper(ratio))}")


def _cheaper(ratio: CostRatio) -> list[str]:
    """Ways to select for less, each with its own ratio."""
    assert ratio.ratio
    smaller = (
        f"a selecting model {_times(ENOUGH / ratio.ratio)} times smaller, and the large one as the recipe's `model`"
    )
    others = [
        f"`strategy: {strategy}` ({'no model' if math.isinf(value) else _times(value)})"
        for strategy, value in ratio.cheaper.items()
    ]
    return [f"{smaller} (LESS-T: {ENOUGH:.0f})", *others]


def _times(number: float) -> str:
    return f"{number:.2g}" if number < ENOUGH else f"{number:,.0f}"


def plan_as_data(forecast: Estimate) -> dict[str, Any]:
    """A plan as JSON for programs has it."""
    assets = [
        {
            "asset": planned.asset,
            "fresh": len(planned.statuses) - planned.due,
            "to_make": [partition or "" for partition, status in planned.statuses.items() if status.state != "fresh"],
            "perhaps": sorted(partition or "" for partition in planned.perhaps),
            "tokens": planned.amount.tokens if planned.amount else 0,
            "seconds": planned.seconds if planned.amount else 0,
            "bytes": planned.amount.bytes if planned.amount else 0,
            "why": _why(planned),
        }
        for planned in forecast.assets
    ]
    totals = {"seconds": forecast.seconds, "tokens": forecast.tokens, "bytes": forecast.bytes}
    compute = [
        {
            "recipe": ratio.recipe,
            "training_over_selection": ratio.ratio,
            "cheaper": {name: None if math.isinf(value) else value for name, value in ratio.cheaper.items()},
        }
        for ratio in forecast.ratios
    ]
    warnings = [forecast.few_warmup_steps] if forecast.few_warmup_steps else []
    return {
        "assets": assets,
        **totals,
        "speeds_not_known": forecast.unknown,
        "compute": compute,
        "warnings": warnings,
    }


def _plan_row(planned: AssetEstimate) -> tuple[str, ...]:
    at_most = "≤ " if planned.perhaps else ""
    counts = (planned.asset, str(len(planned.statuses) - planned.due), f"{at_most}{planned.due}")
    if planned.amount is None:
        return (*counts, "", "", "", "")
    return (
        *counts,
        _count(planned.amount.tokens).rstrip() if planned.amount.tokens else "",
        "?" if planned.seconds is None else duration(planned.seconds),
        f"{_count(planned.amount.bytes)}B" if planned.amount.bytes else "",
        _why(planned),
    )


def _count(number: float) -> str:
    """A number with three digits and a unit: 123, 4.5 k, 67.8 M."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or unit == "T":
            return f"{number:.3g} {unit}" if unit else f"{number:.0f} "
        number /= 1000
    raise AssertionError


def _why(planned: AssetEstimate) -> str:
    certain = [status for partition, status in planned.statuses.items() if partition not in planned.perhaps]
    missing = sum(status.state == "missing" for status in certain)
    stale = [status for status in certain if status.state == "stale"]
    words = []
    if missing:
        words.append(f"{missing} never made")
    if stale:
        words.append(f"{len(stale)} stale: {'; '.join(stale[0].reasons)}")
    if planned.perhaps:
        words.append(f"{len(planned.perhaps)} if what they are made from changes")
    return "; ".join(words)
