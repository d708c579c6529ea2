"""The sections of a report, one a file; VIEWS and SEARCH_VIEWS have them in the order a reader asks."""

from __future__ import annotations

from collections.abc import Callable

from ablate.report.context import Context
from ablate.report.parts import View
from ablate.report.views.balance_story import balance_story
from ablate.report.views.capacity import capacity
from ablate.report.views.controls import controls
from ablate.report.views.cost import cost
from ablate.report.views.flips import flips
from ablate.report.views.interactions import interactions
from ablate.report.views.levels import levels
from ablate.report.views.losses import losses
from ablate.report.views.main_effects import main_effects
from ablate.report.views.mechanism import mechanism
from ablate.report.views.pareto import pareto
from ablate.report.views.power import power
from ablate.report.views.provenance import provenance
from ablate.report.views.prune import prune_test
from ablate.report.views.rates import rates
from ablate.report.views.search.candidates import candidates
from ablate.report.views.search.front import front
from ablate.report.views.search.history import history
from ablate.report.views.search.landscape import dependence, importances, maps
from ablate.report.views.search.parallel import coordinates
from ablate.report.views.skew import skew
from ablate.report.views.trajectories import trajectories
from ablate.report.views.trees import tree_drawing
from ablate.report.views.usage_map import usage_map
from ablate.report.views.verdicts import verdicts

VIEWS: list[Callable[[Context], View]] = [
    verdicts,
    pareto,
    balance_story,
    controls,
    main_effects,
    interactions,
    usage_map,
    tree_drawing,
    trajectories,
    levels,
    skew,
    flips,
    mechanism,
    prune_test,
    losses,
    rates,
    power,
    cost,
    provenance,
]
"""In the order a reader asks."""

FACTS_VIEWS = [*VIEWS[:2], capacity, *VIEWS[2:]]
"""Those of a study that varies how many facts a layer has to store."""

SEARCH_VIEWS: list[Callable[[Context], View]] = [
    candidates,
    front,
    history,
    importances,
    dependence,
    maps,
    coordinates,
    balance_story,
    usage_map,
    tree_drawing,
    trajectories,
    losses,
    rates,
    cost,
    provenance,
]
"""Those of a search, whose candidates were chosen one after the other and are compared in a study of their own."""


def sections(c: Context) -> list[View]:
    """Return the sections of a study's report; a search has sections of its own."""
    usual = FACTS_VIEWS if "capacity" in c.findings else VIEWS
    return [view(c) for view in (SEARCH_VIEWS if c.findings["design"] == "search" else usual)]
