"""What exact scores are likely to be, given sketched ones: the sketch's error, the pool's scores, and Bayes' rule.

Belongs here: that distribution and nothing of selections; fidelity.py judges selections by it.

A sketched score is the exact one plus an error. Three steps:

1. The error is fitted to the rows whose exact score is known: normal to heavy-tailed (Student's t), its size free to
   depend on the exact score and on what else is known of a row. Such rows are sampled by their sketched scores, so the
   likelihood is conditional on having been sampled.
2. The distribution of exact scores over the pool is what, blurred by that error, gives the sketched scores seen there:
   a deconvolution by expectation maximization (Laird 1978, doi:10.1080/01621459.1978.10480103), then fitted to the
   sample, too, under a penalty on the total variation of the log density.
3. Bayes' rule gives the chance that a row with some sketched score has an exact score above a value. What the sample
   leaves open of the error is carried along by repeating 2 and 3 for draws of its parameters (Laplace's approximation).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import gammaln, stdtr

BINS = 120
"""Bins of sketched scores, and values of exact ones: narrow at the cut, wide far from it."""
LEVELS = 5
"""Rows are grouped by the size of error expected of them; each level has its own."""
DRAWS = 6
"""Parameters of the error that are tried: the likeliest ones, and random ones near them."""
SAMPLING_BINS = 24
"""Bins of sketched scores within which rows are taken to be sampled alike."""
EM_STEPS, PENALIZED_STEPS = 40, 40
POOL_WEIGHT = 0.3
"""Weight of a pool row's sketched score against a sampled row's exact one: the form of the error is an assumption."""
VARIATION_PENALTY = 1.5
"""Sampled rows that must agree on a jump of the log density by one before it is believed."""
USUAL_DEGREES = 15
"""Degrees of freedom beyond the least that are expected before anything is seen."""
LEAST_DEGREES = 2.05
"""Degrees of freedom of the heaviest tails."""


@dataclass(frozen=True)
class ErrorScale:
    """How large the sketch's error is: exp(a + growth·z + traits·effects), z the exact score in standard units.

    Attributes:
        center: Exact score at which z is 0.
        width: Exact scores between z = 0 and z = 1; beyond ±3 nothing grows any more.
    """

    center: float
    width: float

    def __call__(self, parameters: np.ndarray, exact: np.ndarray, traits: np.ndarray) -> np.ndarray:
        """Scales float64 (n,), for exact scores (n,) and traits (n, p), or (p,) for all."""
        z = np.clip((exact - self.center) / self.width, -3, 3)
        scale: np.ndarray = np.exp(parameters[2] + parameters[3] * z + traits @ parameters[5:])
        return scale


def degrees_of_freedom(parameters: np.ndarray) -> float:
    """Degrees of freedom of the error."""
    return float(LEAST_DEGREES + np.exp(parameters[4]))


@dataclass(frozen=True)
class ExactScores:
    """The distribution of a row's exact score, by bin of its sketched score and level of error.

    Attributes:
        edges: Edges of the bins, float64 (BINS - 1,), inner ones only.
        level_edges: Values of the expected log error that part the levels, float64 (L - 1,).
        effects: Effect of each trait on the log error, float64 (p,).
        values: Exact scores, ascending, float64 (BINS,).
        above: Chance of an exact score of at least each value, float64 (DRAWS, L, BINS, BINS): bin, then value.
    """

    edges: np.ndarray
    level_edges: np.ndarray
    effects: np.ndarray
    values: np.ndarray
    above: np.ndarray

    def cells(self, sketched: np.ndarray, traits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Level and bin of each row, int64 (n,) each."""
        level = np.searchsorted(self.level_edges, traits @ self.effects, side="right")
        return level, np.searchsorted(self.edges, sketched, side="right")

    def chances(self, cells: tuple[np.ndarray, np.ndarray], value: float) -> np.ndarray:
        """Chance of each row to have an exact score above a value, float64 (DRAWS, n)."""
        position = float(np.interp(value, self.values, np.arange(BINS)))
        lower = min(int(position), BINS - 2)
        share = position - lower
        above = self.above[:, *cells]
        chances: np.ndarray = above[..., lower] * (1 - share) + above[..., lower + 1] * share
        return chances

    def resolution(self, value: float) -> float:
        """Exact scores nearer to a value than this cannot be told from it."""
        return float(np.interp(value, (self.values[1:] + self.values[:-1]) / 2, np.diff(self.values)))


def exact_given_sketched(
    sketched: np.ndarray,
    exact: np.ndarray,
    traits: np.ndarray,
    *,
    pool: np.ndarray,
    pool_traits: np.ndarray,
    inclusion: np.ndarray,
    cut: float,
) -> ExactScores:
    """Fit the distribution of exact scores given sketched ones.

    Args:
        sketched: Sketched scores (n,) of the rows whose exact ones are known.
        exact: Exact scores (n,) of the same rows.
        traits: What else is known of these rows and may decide how large the error is, float64 (n, p), each of order 1.
        pool: Sketched scores (m,) of the pool, or of an even sample of it.
        pool_traits: Traits of these, float64 (m, p).
        inclusion: Chance of each of them to be among the n, up to a factor, float64 (m,).
        cut: Sketched score around which the distribution is wanted most precisely.
    """
    sketched, exact, pool = (np.asarray(scores, dtype=np.float64) for scores in (sketched, exact, pool))
    spread = float(pool.std()) or 1.0
    size = max(1.4826 * float(np.median(np.abs(sketched - exact))), 1e-6 * spread)
    scale = ErrorScale(float(np.median(exact)), float(exact.std()) or spread)
    draws = _fit_error(sketched, exact, traits, scale, size, _sampling(pool, inclusion))
    likeliest = draws[0]
    low, high = min(pool.min(), cut) - 1e-6 * spread, max(pool.max(), cut) + 1e-6 * spread
    unit = 5 * float(np.exp(likeliest[2]))
    ends = np.arcsinh((np.array([low, high]) - cut) / unit)
    edges, places = (cut + unit * np.sinh(np.linspace(ends[0], ends[1], count)) for count in (BINS + 1, BINS))
    values = (places - likeliest[0]) / likeliest[1]
    effects = likeliest[5:]
    level_edges = np.unique(np.quantile(pool_traits @ effects, np.linspace(0, 1, LEVELS + 1)[1:-1]))
    cells = ExactScores(edges[1:-1], level_edges, effects, values, np.empty(0))
    level, score_bin = cells.cells(pool, pool_traits)
    counts = np.zeros((len(level_edges) + 1, BINS))
    np.add.at(counts, (level, score_bin), 1)
    known = np.zeros_like(counts)
    np.add.at(known, cells.cells(sketched, traits), 1)
    middle = np.zeros((len(counts), traits.shape[1]))
    np.add.at(middle, level, pool_traits)
    middle /= np.maximum(1, counts.sum(axis=1, keepdims=True))
    of_value = np.bincount(np.clip(np.searchsorted(values, exact), 0, BINS - 1), minlength=BINS)
    above = []
    for parameters in draws:
        blur = np.stack([_blur(parameters, scale(parameters, values, own), edges, values) for own in middle])
        density = _deconvolve(blur.reshape(-1, BINS), counts, known, of_value)
        posterior = blur * density
        posterior /= np.maximum(posterior.sum(axis=2, keepdims=True), 1e-300)
        chance = np.cumsum(posterior[:, :, ::-1], axis=2)[:, :, ::-1]
        above.append(chance)
    return ExactScores(edges[1:-1], level_edges, effects, values, np.stack(above))


def _sampling(pool: np.ndarray, inclusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bins of sketched scores, finer towards the top, and the chance to be sampled in each, up to a factor."""
    tails = np.geomspace(1, min(0.5, 8 / len(pool)), SAMPLING_BINS)[1:]
    edges = np.unique(np.quantile(pool, 1 - tails))
    pool_bin = np.searchsorted(edges, pool, side="right")
    rows = np.bincount(pool_bin, minlength=len(edges) + 1)
    chance = np.bincount(pool_bin, weights=inclusion, minlength=len(edges) + 1) / np.maximum(1, rows)
    chance = np.where(rows > 0, chance, inclusion.mean())
    return edges, chance / chance.mean()


def _fit_error(
    sketched: np.ndarray,
    exact: np.ndarray,
    traits: np.ndarray,
    scale: ErrorScale,
    size: float,
    sampling: tuple[np.ndarray, np.ndarray],
) -> list[np.ndarray]:
    """`DRAWS` parameters: intercept, slope, log size, growth, log degrees of freedom, and the effects of p traits.

    The likelihood of each sampled row is that of its sketched score given its exact one and given that it was sampled.
    Weak priors, normal around no growth and no effects, hold what 64 rows cannot tell.
    """
    edges, chance = sampling
    p = traits.shape[1]
    prior = np.r_[0, 1, np.log(size), 0, np.log(USUAL_DEGREES), np.zeros(p)]
    deviation = np.r_[0.2 * scale.width, 0.2, 1, 0.5, 1.4, np.full(p, 0.7)]

    def loss(parameters: np.ndarray) -> float:
        degrees, own = degrees_of_freedom(parameters), scale(parameters, exact, traits)
        center = parameters[0] + parameters[1] * exact
        likelihood = _log_density((sketched - center) / own, degrees) - np.log(own)
        below = stdtr(degrees, (edges - center[:, None]) / own[:, None])
        sampled = np.diff(np.c_[np.zeros(len(exact)), below, np.ones(len(exact))], axis=1) @ chance
        return float(0.5 * np.square((parameters - prior) / deviation).sum() - (likelihood - np.log(sampled)).sum())

    bounds = [(None, None), (0.2, 5), (np.log(size) - 5, np.log(size) + 3), (-1.2, 1.2), (-1, 5), *[(-2.5, 2.5)] * p]
    likeliest = minimize(loss, prior, method="L-BFGS-B", bounds=bounds, options={"maxiter": 100}).x
    curvature, axes = np.linalg.eigh(_hessian(loss, likeliest, deviation))
    curvature = np.maximum(curvature, 1.0)  # no draw is wider than the prior
    normal = np.random.default_rng(0).normal(size=(DRAWS - 1, len(prior)))
    drawn = likeliest + (normal / np.sqrt(curvature)) @ axes.T * deviation
    lower, upper = (np.array([pair[end] for pair in bounds[1:]], dtype=np.float64) for end in (0, 1))
    drawn[:, 1:] = np.clip(drawn[:, 1:], lower, upper)
    return [likeliest, *drawn]


def _log_density(t: np.ndarray, degrees: float) -> np.ndarray:
    constant = gammaln((degrees + 1) / 2) - gammaln(degrees / 2) - 0.5 * np.log(degrees * np.pi)
    density: np.ndarray = constant - (degrees + 1) / 2 * np.log1p(t * t / degrees)
    return density


def _hessian(loss: Callable[[np.ndarray], float], at: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Second derivatives by central differences, in units of each parameter."""
    steps = np.diag(1e-3 * unit)
    hessian = np.empty((len(at), len(at)))
    for row, a in enumerate(steps):
        for column, b in enumerate(steps[: row + 1]):
            second = loss(at + a + b) - loss(at + a - b) - loss(at - a + b) + loss(at - a - b)
            hessian[row, column] = hessian[column, row] = second / 4e-6
    return hessian


def _blur(parameters: np.ndarray, scale: np.ndarray, edges: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Chance of each bin of sketched scores given an exact score, float64 (BINS, BINS): bin, then value."""
    distance = (edges[:, None] - parameters[0] - parameters[1] * values) / scale
    below = stdtr(degrees_of_freedom(parameters), distance)
    below[0], below[-1] = 0, 1
    return np.diff(below, axis=0)


def _deconvolve(blur: np.ndarray, counts: np.ndarray, known: np.ndarray, of_value: np.ndarray) -> np.ndarray:
    """The density of exact scores over the pool.

    Args:
        blur: Chance of each cell given an exact score, float64 (L · BINS, BINS).
        counts: Pool rows in each cell, float64 (L, BINS).
        known: Sampled rows in each cell, float64 (L, BINS).
        of_value: Sampled rows at each exact score, int64 (BINS,).

    Returns:
        float64 (BINS,), of sum 1.
    """
    density = np.convolve(counts.sum(axis=0), np.ones(9), "same")
    density += 1e-3 * density.mean()
    filled = (counts + known > 0).ravel()
    blur, counts, known = blur[filled], counts.ravel()[filled], known.ravel()[filled]
    for _ in range(EM_STEPS):
        density *= blur.T @ (counts / np.maximum(blur @ density, 1e-300))
        density /= density.sum()
    # A sampled row counts by the chance of its exact score given its sketched one, which no way of sampling distorts.
    weights = POOL_WEIGHT * counts - known

    def loss(log_density: np.ndarray) -> tuple[float, np.ndarray]:
        density = np.exp(log_density - log_density.max())
        density /= density.sum()
        expected = np.maximum(blur @ density, 1e-300)
        steps = np.diff(log_density)
        lengths = np.sqrt(np.square(steps) + 0.01)
        value = VARIATION_PENALTY * lengths.sum() - weights @ np.log(expected)
        value -= of_value @ np.log(np.maximum(density, 1e-300))
        slope = -(blur.T @ (weights / expected))
        gradient = density * (slope - slope @ density) - of_value + of_value.sum() * density
        turn = VARIATION_PENALTY * steps / lengths
        gradient[1:] += turn
        gradient[:-1] -= turn
        return float(value), gradient

    start = np.log(density + 1e-9 / BINS)
    log_density = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": PENALIZED_STEPS}).x
    result: np.ndarray = np.exp(log_density - log_density.max())
    result /= result.sum()
    return result
