"""The candidates of a search: settings, racing runs, fresh runs, means with intervals, and their order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from ablate.analysis.contrasts import Array
from ablate.analysis.frames import Tables
from ablate.config.endpoints import Endpoint
from ablate.results.columns import FACTOR

Values = dict[str, dict[int, float]]
"""Candidate to seed to value."""


@dataclass(frozen=True)
class Means:
    """Means of candidates over paired seeds; all arrays have one entry a candidate, in the order of `arms`."""

    arms: list[str]
    mean: Array
    factor: Array
    """Variance of the mean, as a multiple of the variance of one run."""
    n: NDArray[np.int64]
    residuals: Array
    """One a run, in the order of `arms`, then of seeds."""
    df: int
    """Degrees of freedom of the residuals."""
    within: float
    """Sum of squares within candidates, differences between seeds included."""
    within_df: int


def adjusted(values: Values) -> Means:
    """Fit candidate + seed by least squares and return each candidate's mean over all seeds.

    A candidate with every seed keeps its plain mean. One that was stopped after some seeds is corrected for how those
    seeds turned out for the others, so that a kind first seed is no advantage.
    """
    arms = [a for a, by_seed in values.items() if by_seed]
    seeds = sorted({s for a in arms for s in values[a]})
    place = {s: j for j, s in enumerate(seeds)}
    ran = np.zeros((len(arms), len(seeds)))
    y = np.zeros_like(ran)
    for i, a in enumerate(arms):
        for s, v in values[a].items():
            ran[i, place[s]], y[i, place[s]] = 1.0, v
    n = ran.sum(1)
    plain = y.sum(1) / np.maximum(n, 1)
    share = ran / np.maximum(n, 1)[:, None]
    normal = np.diag(ran.sum(0)) - ran.T @ share
    inverse = np.linalg.pinv(normal, hermitian=True) if len(seeds) else normal
    effect = inverse @ (ran * (y - plain[:, None])).sum(0)
    mean = plain - share @ effect
    left = ran * (y - mean[:, None] - effect)
    within = ran * (y - plain[:, None])
    rank = int(np.linalg.matrix_rank(normal, hermitian=True)) if len(seeds) else 0
    return Means(
        arms=arms,
        mean=mean,
        factor=1 / np.maximum(n, 1) + np.einsum("cs,st,ct->c", share, inverse, share),
        n=n.astype(np.int64),
        residuals=left[ran > 0],
        df=int(n.sum()) - len(arms) - rank,
        within=float((within**2).sum()),
        within_df=int(n.sum()) - len(arms),
    )


@dataclass(frozen=True)
class Noise:
    """Spread of one run about its candidate's mean, pooled over all candidates and both phases."""

    covariance: Array
    """[k, k] over the objectives, differences between seeds taken out; NaN without degrees of freedom."""
    df: int
    within: Array
    """[k], variances with the differences between seeds left in."""
    within_df: int

    def half(self, objective: int, factor: float) -> float | None:
        """Half of the 95% interval of a mean whose variance is `factor` times that of a run; None where unknown."""
        if not self.df:
            return None
        return float(stats.t.ppf(0.975, self.df) * np.sqrt(self.covariance[objective, objective] * factor))


@dataclass(frozen=True)
class Search:
    """A search's tables, read for its own analysis."""

    tables: Tables
    outcomes: pl.DataFrame
    """Racing and finalists' runs that ended on their own, diverged ones with the untrained model's quality."""

    @cached_property
    def objectives(self) -> list[str]:
        """Names of the objectives."""
        return list(self.tables.study.objectives)

    @cached_property
    def sign(self) -> Array:
        """[k], 1 where less is better, -1 where more is."""
        return np.array([goal.sign for goal in self.tables.study.goals])

    @cached_property
    def order(self) -> list[str]:
        """Candidates in the order in which they were first started."""
        names = self.tables.trials.filter(pl.col("kind").is_in(["search", "finalist"]))["arm"].unique().to_list()
        return sorted(map(str, names), key=lambda a: (len(a), a))

    @cached_property
    def factors(self) -> list[str]:
        """Fields with more than one value over the candidates: the study's factors in its order, then derived sizes."""
        columns = [c.removeprefix(FACTOR) for c in self.tables.trials.columns if c.startswith(FACTOR)]
        known = [f for f in self.tables.study.factors if f in columns]
        found = [*known, *(f for f in columns if f not in known)]
        return [f for f in found if len({repr(s[f]) for s in self.settings.values() if f in s}) > 1]

    @cached_property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Candidate to its fields; a factor whose `when` is not met is left out."""
        out: dict[str, dict[str, Any]] = {}
        columns = [c for c in self.tables.trials.columns if c.startswith(FACTOR)]
        for row in self.tables.trials.unique("arm", keep="first", maintain_order=True).iter_rows(named=True):
            values = {c.removeprefix(FACTOR): row[c] for c in columns}
            factors = self.tables.study.factors
            out[str(row["arm"])] = {
                k: v for k, v in values.items() if k not in factors or exists(k, values, self.tables)
            }
        return {a: out[a] for a in self.order}

    @cached_property
    def plan(self) -> dict[str, Any]:
        """What the engine noted about the search; empty where it noted nothing."""
        found = self.tables.plan.get("search")
        return found if isinstance(found, dict) else {}

    def runs(self, kind: str) -> dict[str, pl.DataFrame]:
        """Candidate to its runs of a kind that count, by seed."""
        rows = self.outcomes.filter(pl.col("kind") == kind).sort("arm", "seed")
        return {str(k[0]): g for k, g in rows.partition_by("arm", as_dict=True, maintain_order=True).items()}

    @cached_property
    def racing(self) -> dict[str, pl.DataFrame]:
        """Racing runs that count, by candidate."""
        return self.runs("search")

    @cached_property
    def fresh(self) -> dict[str, pl.DataFrame]:
        """Runs on fresh seeds that count, by candidate."""
        return self.runs("finalist")

    def sound(self, groups: dict[str, pl.DataFrame]) -> list[str]:
        """Candidates of which no run diverged and every objective is known."""
        return [a for a in self.order if a in groups and self._sound(groups[a])]

    def _sound(self, rows: pl.DataFrame) -> bool:
        whole = all(rows[o].null_count() == 0 for o in self.objectives)
        return whole and not (rows["status"] == "diverged").any()

    def means(self, groups: dict[str, pl.DataFrame]) -> list[Means]:
        """Adjusted means of the sound candidates, one entry an objective."""
        kept = self.sound(groups)
        return [
            adjusted({a: dict(zip(groups[a]["seed"], groups[a][o], strict=True)) for a in kept})
            for o in self.objectives
        ]

    @cached_property
    def race(self) -> list[Means]:
        """Adjusted racing means, one entry an objective."""
        return self.means(self.racing)

    @cached_property
    def final(self) -> list[Means]:
        """Adjusted means on fresh seeds, one entry an objective."""
        return self.means(self.fresh)

    @cached_property
    def noise(self) -> Noise:
        """Spread of one run, from both phases."""
        k = len(self.objectives)
        df = self.race[0].df + self.final[0].df
        within_df = self.race[0].within_df + self.final[0].within_df
        left = np.concatenate([np.stack([m.residuals for m in phase]) for phase in (self.race, self.final)], axis=1)
        within = np.array([a.within + b.within for a, b in zip(self.race, self.final, strict=True)])
        return Noise(
            covariance=left @ left.T / df if df else np.full((k, k), np.nan),
            df=df,
            within=within / within_df if within_df else np.full(k, np.nan),
            within_df=within_df,
        )

    @cached_property
    def corner(self) -> Array:
        """[k], the worst value of each objective, over which a hypervolume is measured."""
        return np.array([self._worst(goal) for goal in self.tables.study.goals])

    def _worst(self, goal: Endpoint) -> float:
        if goal.worst is not None:
            return goal.worst
        starts = self.tables.trials[goal.start].drop_nulls()
        return float(starts.median()) if len(starts) else np.nan  # type: ignore[arg-type]

    @cached_property
    def ranking(self) -> list[str]:
        """Sound candidates, best first: finalists by their means on fresh seeds, then the others by their racing means.

        With several objectives those that no other beats come first, and among them the one nearest to the best value
        of each objective, every objective scaled to its range.
        """
        out: list[str] = []
        for phase in (self.final, self.race):
            arms = [a for a in phase[0].arms if a not in out]
            at = [phase[0].arms.index(a) for a in arms]
            points = np.stack([m.mean[at] * s for m, s in zip(phase, self.sign, strict=True)], axis=1)
            out += [arms[i] for i in ranked(points)]
        return out

    @cached_property
    def base(self) -> str | None:
        """The candidate whose settings are the study's base, None where there is none."""
        study = self.tables.study
        base = study.trial({})
        for arm, settings in self.settings.items():
            tree = study.trial({k: v for k, v in settings.items() if v is not None}).tree
            rest = ((k, v) for k, v in settings.items() if not k.startswith("tree."))
            if tree.plain() == base.tree.plain() and all(same(v, base.value(k)) for k, v in rest):
                return arm
        return None


def exists(factor: str, values: dict[str, Any], tables: Tables) -> bool:
    """Whether a factor plays a part beside these values: its `when` is met, and so is that of what it depends on."""
    factors = tables.study.factors
    return all(
        other in values and same(values[other], level) and (other not in factors or exists(other, values, tables))
        for other, level in factors[factor].when.items()
    )


def same(a: Any, b: Any) -> bool:
    """Whether two settings are equal; 1 and 1.0 are, True and 1 are not."""
    if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return float(a) == float(b)
    return str(a) == str(b)


def dominated(points: Array) -> NDArray[np.bool_]:
    """Which of the points [..., m, k] (less is better) another beats: no worse in any objective, better in one."""
    a, b = points[..., :, None, :], points[..., None, :, :]
    return np.asarray(((b <= a).all(-1) & (b < a).any(-1)).any(-1))


def ranked(points: Array) -> list[int]:
    """Places of the points [m, k] (less is better), best first: front after front, within one by distance to its ideal."""
    left = list(range(len(points)))
    out: list[int] = []
    while left:
        beaten = dominated(points[left])
        front = [i for i, b in zip(left, beaten, strict=True) if not b]
        own = points[front]
        span = np.ptp(own, axis=0)
        distance = np.sqrt((((own - own.min(0)) / np.where(span > 0, span, 1.0)) ** 2).sum(1))
        out += [front[i] for i in np.lexsort((np.arange(len(front)), own[:, 0], distance))]
        left = [i for i, b in zip(left, beaten, strict=True) if b]
    return out


def probabilities(
    points: Array, factor: Array, noise: Noise, sign: Array, rng: np.random.Generator, draws: int = 1000
) -> list[float] | None:
    """Share of seeded draws of all means in which no other candidate beats a candidate; None where noise is unknown.

    Means [m, k] are drawn from a multivariate t: covariance of one run times `factor` [m], degrees of freedom of the
    pooled residuals. This is a parametric bootstrap, so the share of a crowded front is spread over its candidates.
    """
    m, k = points.shape
    if not m:
        return []
    if not noise.df:
        return None
    values, vectors = np.linalg.eigh(noise.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))
    hit = np.zeros(m)
    part = max(1, 4_000_000 // (m * m * k))  # draws that are compared at a time
    for start in range(0, draws, part):
        count = min(part, draws - start)
        scale = np.sqrt(noise.df / rng.chisquare(noise.df, size=(count, 1, 1)))
        moved = points + scale * np.sqrt(factor)[:, None] * (rng.normal(size=(count, m, k)) @ root.T)
        hit += (~dominated(moved * sign)).sum(0)
    return [float(h) / draws for h in hit]
