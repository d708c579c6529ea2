"""Does gradient skew say which nodes will lose a side? Tested on seeds that the prediction never saw.

If the gradient's asymmetry is what starves leaves, then a node whose two sides are both in use, but whose gradients are
skewed, should later lose a side more often than an equally lopsided, equally busy node without skew. Rows are sides of
nodes; the prediction by share, traffic, level and router offset is compared with the same plus skew, by area under the
ROC curve on each held-out seed. The seed is the unit: its rows are anything but independent.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from ablate.balance.metrics import MIN_SIDE, node_counts
from ablate.balance.usage import counts_from, nodes_from, steps_of

Floats = NDArray[np.float64]

MIN_SHARE = 0.1
"""Both sides of a node have at least this share of its tokens when the prediction is made."""
LOST_SHARE = 0.01
"""A side is lost where its share at the last evaluation is under this."""

ROUNDING = 1e-9
"""A standard error under this share of its coefficient is rounding."""

BASE = ("log_share", "log_traffic", "level", "offset", "fuller")
"""What the prediction without skew may use."""


SIDE_SCHEMA: dict[str, pl.DataType] = {
    "seed": pl.Int64(),
    "layer": pl.Int16(),
    "tree": pl.Int16(),
    "level": pl.Int8(),
    "index": pl.Int32(),
    "right": pl.Boolean(),  # which side of the node
    "log_share": pl.Float64(),  # of the node's tokens, that took this side
    "log_traffic": pl.Float64(),  # of the tree's tokens, that reached the node
    "offset": pl.Float64(),
    "fuller": pl.Boolean(),  # whether this is the side with more tokens
    "skew": pl.Float64(),  # above 0 where gradients are larger on this side
    "lost": pl.Boolean(),
}


def side_rows(usage: pl.DataFrame, seed: int, *, step: int) -> pl.DataFrame:
    """The sides of one trial's nodes at an evaluation, with what became of them at the last: a row per side.

    Nodes count whose sides both have MIN_SHARE of at least 2·MIN_SIDE tokens at `step`, whose skew and offset are
    known, and which MIN_SIDE tokens still reach at the end. Raises ValueError where the table has no such evaluation.
    """
    counts, steps = counts_from(usage), steps_of(usage)
    if step not in steps[:-1]:
        raise ValueError(f"step is {step}: an evaluation before the last is expected, one of {steps[:-1].tolist()}")
    at = int(np.flatnonzero(steps == step)[0])
    skew, offset = nodes_from(usage, "skew")[at], nodes_from(usage, "offset")[at]
    now, end = node_counts(counts[at]), node_counts(counts[-1])
    frames = [pl.DataFrame(schema=SIDE_SCHEMA)]
    for level in range(len(now) - 1):
        first = (1 << level) - 1
        heap = slice(first, first + (1 << level))
        total, later = now[level], end[level]
        right = np.divide(now[level + 1][..., 1::2], total, out=np.zeros(total.shape), where=total > 0)
        usable = (total >= 2 * MIN_SIDE) & (np.minimum(right, 1 - right) >= MIN_SHARE) & (later >= MIN_SIDE)
        usable &= np.isfinite(skew[..., heap]) & np.isfinite(offset[..., heap])
        layer, tree, index = np.nonzero(usable)
        traffic = total[usable] / now[0][layer, tree, 0]
        right_later = end[level + 1][..., 1::2][usable] / later[usable]
        for goes_right in (False, True):
            share = right[usable] if goes_right else 1 - right[usable]
            share_later = right_later if goes_right else 1 - right_later
            columns = {
                "seed": np.full(len(layer), seed),
                "layer": layer,
                "tree": tree,
                "level": np.full(len(layer), level),
                "index": index,
                "right": np.full(len(layer), goes_right),
                "log_share": np.log(share),
                "log_traffic": np.log(traffic),
                "offset": offset[..., heap][usable],
                "fuller": share > 0.5,
                "skew": skew[..., heap][usable] * (1 if goes_right else -1),
                "lost": share_later < LOST_SHARE,
            }
            frames.append(pl.DataFrame(columns, schema=SIDE_SCHEMA, strict=False))
    return pl.concat(frames)


@dataclass(frozen=True, kw_only=True)
class SkewPrediction:
    """What skew adds to the prediction, with seeds as the unit."""

    seeds: tuple[int, ...]
    """Seeds on which an AUC could be taken: left out in turn, with lost and kept sides among their rows."""
    auc_base: tuple[float, ...]
    """By share, traffic, level and offset, on each held-out seed."""
    auc_skew: tuple[float, ...]
    """By the same and skew."""
    gain: float
    """Mean difference."""
    interval: tuple[float, float]
    """95% t interval of the gain over seeds."""
    p: float
    """Paired t test over seeds, two-sided."""
    coefficient: float
    """Log odds of losing a side, per standard deviation of skew towards it, fitted on all seeds."""
    coefficient_error: float
    """Its standard error, clustered by seed; NaN where the seeds leave none."""
    rows: int
    lost: int


def predict(rows: pl.DataFrame) -> SkewPrediction:
    """Fit both logistic regressions on all seeds but one, and compare them on that one; for each seed in turn.

    Raises ValueError with fewer than 3 usable seeds: there is nothing to hold out then.
    """
    import statsmodels.api as sm  # type: ignore[import-untyped] # takes a second that most reports need not wait

    seeds, lost = rows["seed"].to_numpy(), rows["lost"].to_numpy()
    base = rows.select(pl.col(*BASE).cast(pl.Float64)).to_numpy()
    full = np.column_stack([base, rows["skew"].to_numpy()])
    used: list[int] = []
    aucs: list[tuple[float, float]] = []
    for seed in np.unique(seeds):
        out = seeds == seed
        if len(np.unique(lost[out])) < 2 or len(np.unique(lost[~out])) < 2:
            continue
        scores = [_scores(x[~out], lost[~out], x[out]) for x in (base, full)]
        used.append(int(seed))
        aucs.append((auc(scores[0], lost[out]), auc(scores[1], lost[out])))
    if len(used) < 3:
        raise ValueError(f"{len(used)} seeds have both lost and kept sides: at least 3 are needed")
    without, with_skew = (np.array(a) for a in zip(*aucs, strict=True))
    gains = with_skew - without
    half = float(stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains))
    # Equal gains have no spread to test against: no gain at all is then no evidence, any other is certain.
    p = float(stats.ttest_1samp(gains, 0.0).pvalue) if np.ptp(gains) > 0 else float(gains[0] == 0)
    x, _ = _standard(full, full)
    with warnings.catch_warnings():
        # A side that nothing of its kind ever loses separates perfectly; the interval then says how little is known.
        warnings.simplefilter("ignore")
        fit = sm.GLM(lost.astype(float), sm.add_constant(x, has_constant="add"), sm.families.Binomial()).fit(
            cov_type="cluster", cov_kwds={"groups": seeds}
        )
    coefficient, error = float(fit.params[-1]), float(fit.bse[-1])
    return SkewPrediction(
        seeds=tuple(used),
        auc_base=tuple(without.tolist()),
        auc_skew=tuple(with_skew.tolist()),
        gain=float(gains.mean()),
        interval=(float(gains.mean()) - half, float(gains.mean()) + half),
        p=p,
        coefficient=coefficient,
        # Few clusters whose scores cancel leave an error of rounding alone: it is unknown, not 0.
        coefficient_error=error if error > ROUNDING * abs(coefficient) else math.nan,
        rows=len(rows),
        lost=int(lost.sum()),
    )


def auc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counted half."""
    n, m = int(positive.sum()), int((~positive).sum())
    ranks = stats.rankdata(scores)
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def _scores(x: Floats, y: NDArray[np.bool_], held_out: Floats) -> Floats:
    """Linear predictor on held-out rows, of a logistic regression with a slight ridge (events are few)."""
    import statsmodels.api as sm  # as in `predict`

    x, held_out = _standard(x, held_out)
    design = sm.add_constant(x, has_constant="add")
    penalty = np.r_[0.0, np.full(x.shape[1], 1.0 / len(x))]
    fit = sm.GLM(y.astype(float), design, sm.families.Binomial()).fit_regularized(alpha=penalty, L1_wt=0.0)
    out: Floats = sm.add_constant(held_out, has_constant="add") @ fit.params
    return out


def _standard(x: Floats, other: Floats) -> tuple[Floats, Floats]:
    """Both in units of x's standard deviations, around its means; a constant column becomes 0."""
    mean, sd = x.mean(0), x.std(0)
    sd = np.where(sd > 0, sd, np.inf)
    return (x - mean) / sd, (other - mean) / sd
