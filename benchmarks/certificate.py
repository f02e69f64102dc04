"""Does a certificate keep its word? Simulated pools whose exact scores are known: `python -m benchmarks.certificate`.

In each world exact scores have another distribution, or the sketch's error another form. A certificate is made as the
product makes it: 64 rows are scored exactly, three quarters of them around the cut. Then what it says of the selected
5 % is compared with what is true. Results go to `benchmarks/results/certificate.json`:

- `right`: share of the rows called certain that exact scores select, too (1 where no row is called certain),
- `bias`: mean of expected minus real overlap,
- `certain`: share of the selected rows that are called certain, `overlap`: real overlap; means over all pools.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from less_assets.method.selection.fidelity import ScoredSample, judge, row_traits
from less_assets.method.selection.ranking import Queue, select_from_sample
from less_assets.steps.certificates import NEAR_DEPTH, Cut, inclusion_near

RESULT = Path(__file__).parent / "results/certificate.json"
ROWS, SHARE, SAMPLED = 10_000, 0.05, 64
NOISES = (0.15, 0.4, 0.8)
"""Size of the sketch's error, where exact scores spread by about 1."""
QUEUE = Queue("task", None, (0,), "max")


@dataclass(frozen=True)
class Pool:
    """A simulated pool of n rows.

    Attributes:
        exact: Exact scores, float64 (n,).
        error: The sketch's error of each row at noise 1, float64 (n,).
        source: Source of each row, int64 (n,).
        length: Loss tokens of each row, float64 (n,).
    """

    exact: np.ndarray
    error: np.ndarray
    source: np.ndarray
    length: np.ndarray


def plain(exact: Callable[[np.random.Generator], np.ndarray]) -> Callable[[np.random.Generator], Pool]:
    """A world in which only the distribution of exact scores is special."""
    return lambda rng: _pool(rng, exact(rng))


def _pool(
    rng: np.random.Generator,
    exact: np.ndarray,
    error: np.ndarray | None = None,
    source: np.ndarray | None = None,
    length: np.ndarray | None = None,
) -> Pool:
    return Pool(
        exact,
        rng.normal(size=ROWS) if error is None else error,
        np.zeros(ROWS, dtype=np.int64) if source is None else source,
        _lengths(rng) if length is None else length,
    )


def _lengths(rng: np.random.Generator) -> np.ndarray:
    return np.exp(4 + 0.7 * rng.normal(size=ROWS))


def _clusters(rng: np.random.Generator) -> np.ndarray:
    return np.array([-2, -0.5, 0.5, 2])[rng.integers(0, 4, size=ROWS)] + 0.25 * rng.normal(size=ROWS)


def _near_ties(rng: np.random.Generator) -> np.ndarray:
    exact = rng.normal(size=ROWS)
    best = np.argsort(-exact)[: ROWS // 10]
    exact[best] = 1.28 + 0.05 * rng.random(len(best))
    return exact


def _error_of_group(rng: np.random.Generator) -> Pool:
    source = (rng.random(ROWS) < 0.2).astype(np.int64)
    return _pool(rng, rng.normal(size=ROWS), rng.normal(size=ROWS) * np.where(source, 3, 0.6), source)


def _error_of_length(rng: np.random.Generator) -> Pool:
    length = _lengths(rng)
    return _pool(rng, rng.normal(size=ROWS), rng.normal(size=ROWS) * 60 / length, length=length)


def _error_of_score(rng: np.random.Generator) -> Pool:
    exact = rng.normal(size=ROWS)
    return _pool(rng, exact, rng.normal(size=ROWS) * (0.4 + np.maximum(0, exact)))


def _error_of_hidden_scale(rng: np.random.Generator) -> Pool:
    return _pool(rng, rng.normal(size=ROWS), rng.normal(size=ROWS) * np.exp(rng.normal(size=ROWS)) / 1.6)


WORLDS: dict[str, Callable[[np.random.Generator], Pool]] = {
    "gaussian": plain(lambda rng: rng.normal(size=ROWS)),
    "t2": plain(lambda rng: rng.standard_t(2, size=ROWS)),
    "t3": plain(lambda rng: rng.standard_t(3, size=ROWS)),
    "log_normal": plain(lambda rng: np.exp(rng.normal(size=ROWS))),
    "clusters": plain(_clusters),
    "left_skewed": plain(lambda rng: -np.exp(0.8 * rng.normal(size=ROWS))),
    "near_ties": plain(_near_ties),
    "uniform": plain(lambda rng: 3.4 * rng.random(ROWS)),
    "error_grows_with_score": _error_of_score,
    "error_differs_by_group": _error_of_group,
    "error_differs_by_length": _error_of_length,
    "error_differs_by_hidden_scale": _error_of_hidden_scale,
}


def certify(pool: Pool, noise: float, rng: np.random.Generator) -> tuple[pl.DataFrame, np.ndarray]:
    """Certify the best rows of a pool.

    Args:
        pool: The pool.
        noise: Factor of its errors.
        rng: Draws the sample.

    Returns:
        `fidelity.JUDGED_SCHEMA` of the selected rows, and which of them exact scores select, too, bool (rows,).
    """
    sketched = (pool.exact + noise * pool.error).astype(np.float32)
    table = pl.DataFrame(
        {
            "scores": sketched,
            "source": pool.source.astype(str),
            "loss_tokens": np.maximum(1, pool.length).astype(np.int32),
        }
    )
    rows = round(SHARE * ROWS)
    deeper = select_from_sample(sketched[:, None], [QUEUE], NEAR_DEPTH * rows)
    inclusion = inclusion_near([Cut("scores", QUEUE, float(deeper["score"].to_numpy().min()))], table)(table)
    drawn = np.argsort(rng.random(ROWS) / inclusion)[:SAMPLED]
    traits_of = row_traits(table)
    traits = traits_of(table)
    sample = ScoredSample(
        sketched[drawn, None],
        pool.exact[drawn, None].astype(np.float32),
        sketched[:, None],
        ROWS,
        inclusion,
        traits[drawn],
        traits,
        traits_of,
    )
    selected = deeper.head(rows)
    places = selected["example_id"].cast(pl.Int64).to_numpy()
    best = np.zeros(ROWS, dtype=bool)
    best[np.argsort(-pool.exact, kind="stable")[:rows]] = True
    return judge(sample, [QUEUE], selected.hstack(table[places].drop("scores"))).table, best[places]


def measure(world: str, repetitions: int) -> dict[str, float]:
    """What certificates say in a world, against the truth, over all noises and some pools of each."""
    right = certain = selected = 0
    expected, real = [], []
    for noise in NOISES:
        for repetition in range(repetitions):
            rng = np.random.default_rng([repetition, round(100 * noise)])
            judged, hit = certify(WORLDS[world](rng), noise, rng)
            called = judged["certain"].to_numpy()
            right, certain, selected = right + int(hit[called].sum()), certain + int(called.sum()), selected + len(hit)
            expected.append(float(judged["chance"].to_numpy().mean()))
            real.append(float(hit.mean()))
    differences = np.subtract(expected, real)
    return {
        "right": round(right / certain if certain else 1.0, 4),
        "bias": round(float(differences.mean()), 4),
        "deviation": round(float(differences.std()), 4),
        "certain": round(certain / selected, 4),
        "overlap": round(float(np.mean(real)), 4),
    }


def as_markdown(results: dict[str, dict[str, float]]) -> str:
    """The table of the documentation."""
    lines = ["| world | `right` | `bias` | ± | certain | real overlap |", "|---|---|---|---|---|---|"]
    for world, figures in results.items():
        shown = f"{figures['right']:.3f} | {figures['bias']:+.3f} | {figures['deviation']:.3f}"
        lines.append(f"| {world.replace('_', ' ')} | {shown} | {figures['certain']:.1%} | {figures['overlap']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all worlds, print them, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--repetitions", type=int, default=24, help="pools of each noise (default: 24)")
    repetitions = parser.parse_args().repetitions
    results = {}
    for world in WORLDS:
        results[world] = measure(world, repetitions)
        print(f"{world:32}", *(f"{name} {value:+.3f}" for name, value in results[world].items()), flush=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
