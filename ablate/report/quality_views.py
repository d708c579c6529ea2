"""Views of quality and cost: balance against bpb, loss curves and learning rates, pruning, and what each arm costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ablate.report.context import Context
from ablate.report.draw import ellipse, few_ticks, legend, mark, plain, plotly_mark
from ablate.report.parts import Column, Table, View
from ablate.report.style import DASHES, INK, MUTED, ArmStyle, new

SEED_DOTS = 1500  # runs drawn one by one; above that, arm means only


def pareto(c: Context) -> View:
    """Balance against quality, seeds as dots, dense controls as lines."""
    view = View("pareto", "Balance against quality", "Is balance paid for in bits per byte?")
    found = c.findings["pareto"]
    if not found:
        view.missing = f"No run with both bpb and balance: run `ablate study run studies/{c.tables.name}.yaml`."
        return view
    ended = c.outcomes.filter(pl.col("bpb").is_not_null() & pl.col("n_eff_frac").is_not_null())
    finished = ended.filter(pl.col("status") == "finished").sort("arm", "seed")
    view.data["pareto"] = ended.select("arm", "seed", "trial", "run_id", "status", "n_eff_frac", "bpb").sort(
        "arm", "seed"
    )
    figure = new(7.2, 4.9)
    ax = figure.subplots()
    traces: list[dict[str, Any]] = []
    groups = {k[0]: g for k, g in finished.partition_by("arm", as_dict=True, maintain_order=True).items()}
    dots = finished.height <= SEED_DOTS
    on_front = {r["arm"] for r in found["arms"] if r["on_front"]}
    shown = [a for a in c.order if a in groups and (dots or len(groups) <= 400 or a in on_front or a in c.shown)]
    for arm in shown:
        x, y, style = groups[arm]["n_eff_frac"].to_list(), groups[arm]["bpb"].to_list(), c.styles.arms[arm]
        if dots:
            ax.plot(x, y, linestyle="none", markersize=4.5, alpha=0.8, **mark(style))
        ax.plot(np.mean(x), np.mean(y), linestyle="none", markersize=9 if dots else 4, **mark(style))
        ring = ellipse(x, y) if len(groups) <= 24 else None
        if ring:
            ax.plot(*ring, color=style.colour, linewidth=0.7, alpha=0.6, linestyle=DASHES[style.dash])
        label = c.labels[arm]
        traces.append(_dots(groups[arm], label, style, dots, len(shown) <= 24))
    if len(groups):
        values = finished["bpb"].to_numpy()
        low, high = float(values.min()), float(values.max())
        # One poor arm must not flatten the others: beyond four usual spreads it is named instead of drawn.
        q1, q3 = np.quantile(values, [0.25, 0.75])
        top = min(high, float(q3 + 4 * max(q3 - q1, 1e-3)))
        controls = _controls(c)
        top = max([top, *controls.values()]) if controls else top
        pad = 0.06 * max(top - low, 1e-3)
        bottom = min([low, *controls.values()]) if controls else low
        ax.set_ylim(bottom - pad, top + pad)
        for k, (name, value) in enumerate(controls.items()):
            ax.axhline(value, color=INK, linewidth=1.1, linestyle=DASHES[1 + k % 3])
            ax.annotate(
                name, (0.005, value), xycoords=("axes fraction", "data"), fontsize=7.5, color=MUTED, va="bottom"
            )
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": plain(name),
                    "x": [0, 1],
                    "y": [value, value],
                    "line": {"color": INK, "width": 1.2, "dash": ["dash", "dot", "dashdot"][k % 3]},
                    "hovertemplate": f"{plain(name)}: %{{y:.4f}}<extra></extra>",
                }
            )
        off = int((values > top).sum())
        if off:
            view.reading.append(f"{off} finished run(s) lie above the drawn range; the table has them.")
        front = sorted(
            (r for r in found["arms"] if r["on_front"] and r["arm"] in groups), key=lambda r: r["n_eff_frac"]
        )
        ax.step(
            [r["n_eff_frac"] for r in front],
            [r["bpb"] for r in front],
            where="pre",
            color=MUTED,
            linewidth=0.9,
            zorder=1,
        )
        ax.axvline(0.8, color=MUTED, linewidth=0.8, linestyle=":")
        layout = {
            "xaxis": {"title": {"text": "effective leaves / L (right is better)"}, "range": [0, 1.02]},
            "yaxis": {"title": {"text": "bits per byte (down is better)"}, "range": [bottom - pad, top + pad]},
            "height": 560,
        }
        view.plots.append(("pareto", {"data": traces, "layout": layout}))
    ax.set_xlim(0, 1.02)
    ax.set_xlabel("effective leaves / L (right is better; dotted: 0.8)")
    ax.set_ylabel("bits per byte (down is better)")
    legend(figure, c.styles, columns=3, controls=False)  # lines, named where they are drawn
    what = (
        "small marks are seeds, large ones means (from five seeds on with their 95% ellipse)"
        if dots
        else "marks are means over seeds"
    )
    view.figures.append(("pareto", f"Balance against quality: {what}; step line: arms no other beats on both", figure))
    rows = sorted(
        (
            {
                "arm": c.labels[r["arm"]],
                **{k: r[k] for k in ("n_eff_frac", "bpb", "probability", "n")},
                "front": "yes" if r["on_front"] else "no",
                "runs": r["run_ids"],
            }
            for r in found["arms"]
        ),
        key=lambda r: (-r["probability"], r["bpb"]),
    )
    columns = [
        Column("arm", "arm"),
        Column("n_eff_frac", "n_eff_frac", ".3f"),
        Column("bpb", "bpb", ".4f"),
        Column("front", "on the front"),
        Column(
            "probability",
            "P(not beaten)",
            ".2f",
            "share of 1,000 seed resamples in which no other arm beats it on both",
        ),
        Column("n", "n", "d"),
        Column("runs", "runs", "runs"),
    ]
    view.tables.append(Table("pareto_front", "Who is beaten on both, and how sure that is", columns, rows))
    sure = [r["arm"] for r in rows if r["probability"] >= 0.5]
    low_v, high_v = found["interval"]
    names = ", ".join(sure[:6]) + (" and others" if len(sure) > 6 else "")
    if sure:
        view.reading.insert(0, f"Not beaten on both axes in at least half of the seed resamples: {names}.")
    else:
        view.reading.insert(0, "No arm is on the front in half of the seed resamples.")
    point = found["reference_point"]
    view.reading.append(
        f"Hypervolume over (n_eff_frac {point['n_eff_frac']:g}, bpb {point['bpb']:.3f}): {found['hypervolume']:.4f} "
        f"({low_v:.4f} to {high_v:.4f} over seed resamples)."
    )
    lost = [e for e in c.findings["exclusions"] if e["kept"]]
    if lost:
        view.reading.append(
            f"{len(lost)} diverged run(s) count in the table with the untrained model's bpb and are not drawn."
        )
    return view


def _dots(group: pl.DataFrame, label: str, style: ArmStyle, dots: bool, named: bool) -> dict[str, Any]:
    """One arm's plotly trace: every seed where they are drawn, and the mean, larger."""
    x, y = group["n_eff_frac"].to_list(), group["bpb"].to_list()
    text = [f"seed {s}, run {i[:8]}" for s, i in zip(group["seed"], group["run_id"], strict=True)] if dots else []
    many = len(x) if dots else 0
    marker = plotly_mark(style) | {"size": [8] * many + [13]}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(label),
        "x": [*x[:many], float(np.mean(x))],
        "y": [*y[:many], float(np.mean(y))],
        "text": [*text, f"mean of {len(x)}"],
        "marker": marker,
        "showlegend": named,
        "hovertemplate": "%{text}<br>n_eff %{x:.3f}, bpb %{y:.4f}<extra>" + plain(label) + "</extra>",
    }


def _controls(c: Context) -> dict[str, float]:
    out = {}
    for a in c.findings["arms"]:
        # Those in an arm's own activation stand in the section on controls.
        if a["kind"] == "control" and a["bpb"] and " " not in a["arm"]:
            out[a["label"]] = a["bpb"]["mean"]
    return out


def losses(c: Context) -> View:
    """Loss curves of every arm, and how each depends on the learning rate."""
    view = View(
        "loss", "Loss curves and learning rates", "Was every arm trained to its end, at a learning rate that suits it?"
    )
    history = c.tables.history.filter(pl.col("bpb").is_not_null() & (pl.col("kind") != "tune") & (pl.col("step") > 0))
    present = set(history["arm"].unique())
    arms = [a for a in c.order if a in present]
    arms = [a for a in arms if a in c.shown or c.kinds[a] == "control"]
    if not arms:
        view.missing = f"No evaluation after step 0: run `ablate study run studies/{c.tables.name}.yaml`."
        return view
    means = (
        history.filter(pl.col("arm").is_in(arms))
        .group_by("arm", "step")
        .agg(
            pl.col("bpb").mean(),
            pl.col("bpb").min().alias("low"),
            pl.col("bpb").max().alias("high"),
            pl.len().alias("n"),
        )
        .sort("arm", "step")
    )
    view.data["loss_curves"] = means
    figure, difference = new(7.2, 4.4), new(7.2, 4.2)
    ax, against = figure.subplots(), difference.subplots()
    reference = c.findings["reference"]
    base = means.filter(pl.col("arm").eq_missing(pl.lit(reference))).select("step", base="bpb")
    traces = []
    for arm in arms:
        part, style = means.filter(pl.col("arm") == arm), c.styles.arms[arm]
        line: dict[str, Any] = {"linestyle": DASHES[style.dash], "linewidth": 1.3, "markersize": 3.5, **mark(style)}
        ax.fill_between(part["step"], part["low"], part["high"], color=style.colour, alpha=0.12, linewidth=0)
        ax.plot(part["step"], part["bpb"], **line)
        both = part.join(base, on="step").sort("step")
        against.plot(both["step"], both["bpb"] - both["base"], **line)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plain(c.labels[arm]),
                "x": part["step"].to_list(),
                "y": part["bpb"].to_list(),
                "line": {"color": style.colour, "dash": ["solid", "dash", "dot", "dashdot"][style.dash]},
                "marker": plotly_mark(style, 6),
                "hovertemplate": "step %{x}: %{y:.4f}<extra>" + plain(c.labels[arm]) + "</extra>",
            }
        )
    last = means.group_by("arm").agg(pl.col("bpb").last())["bpb"].to_numpy()
    late = means.filter(pl.col("step") >= 0.4 * pl.col("step").max())
    top = max(float(np.max(late["high"].to_numpy())), float(np.max(last)))
    ax.set_ylim(float(last.min()) - 0.05 * (top - float(last.min())), top)
    since = float(late["step"].to_numpy().min()) * 0.85
    ax.set_xlim(left=since)
    ax.set_ylabel("bits per byte on the held-out slice")
    ax.set_xlabel("optimizer step")
    few_ticks(ax, against)
    legend(figure, c.styles, lines=True, columns=3)
    caption = "Means over seeds (band: lowest to highest); the steep start is cut off"
    view.figures.append(("loss_curves", caption, figure))
    if reference in arms:
        against.set_xlabel("optimizer step")
        against.set_ylabel(f"bits per byte, minus {c.labels[reference]}")
        legend(difference, c.styles, lines=True, columns=3)
        view.figures.append(("loss_differences", "The same means minus those of the reference arm", difference))
    layout = {
        "xaxis": {"title": {"text": "optimizer step"}, "range": [since, float(late["step"].to_numpy().max())]},
        "yaxis": {"title": {"text": "bits per byte"}, "range": [float(last.min()) - 0.02, top]},
        "height": 520,
    }
    view.plots.append(("loss_curves", {"data": traces, "layout": layout}))
    if c.choice:
        view.reading.append(c.choice)
    _rates(c, view)
    return view


def _rates(c: Context, view: View) -> None:
    records = [r for r in c.findings["learning_rates"] if r["best"] is not None]
    if not records:
        view.reading.append(
            "Learning rates were not tuned per arm; a difference may be one of tuning. Give the study a `tune:` section "
            "(three rates or more) and run `ablate study run` again."
        )
        return
    edge = [c.labels.get(r["arm"], r["arm"]) for r in records if not r["interior"]]
    view.reading.append(
        "Every arm's best learning rate lies inside those tried."
        if not edge
        else f"Best rate at the edge of those tried, so perhaps not the best there is: {', '.join(edge)}."
    )
    rows = [
        {
            "arm": c.labels.get(r["arm"], r["arm"]),
            "best": r["best"],
            "interior": "yes" if r["interior"] else "no",
            "rates": "; ".join(
                f"{x['lr']:g}: {'diverged' if x['bpb'] is None else format(x['bpb'], '.4f')}" for x in r["rates"]
            ),
            "best_of": "; ".join(f"{v:.4f}" for v in r["best_of_n"]),
            "runs": r["run_ids"],
        }
        for r in records
    ]
    columns = [
        Column("arm", "arm"),
        Column("best", "best rate", ".3g"),
        Column("interior", "interior"),
        Column("rates", "bpb at each rate"),
        Column("best_of", "expected best of 1, 2, … rates"),
        Column("runs", "runs", "runs"),
    ]
    view.tables.append(Table("learning_rates", "Learning rates tried, on tuning seeds of their own", columns, rows))
    figure = new(6.6, 3.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for r in [r for r in records if r["arm"] in c.shown or len(records) <= 16]:
        style = c.styles.arms.get(r["arm"])
        if style is None:
            continue
        known = [x for x in r["rates"] if x["bpb"] is not None]
        left.plot(
            [x["lr"] for x in known],
            [x["bpb"] for x in known],
            linestyle=DASHES[style.dash],
            markersize=5,
            linewidth=1.2,
            **mark(style),
        )
        right.plot(
            range(1, len(r["best_of_n"]) + 1),
            r["best_of_n"],
            linestyle=DASHES[style.dash],
            markersize=5,
            linewidth=1.2,
            **mark(style),
        )
    left.set_xscale("log")
    rates = sorted({x["lr"] for r in records for x in r["rates"]})
    left.set_xticks(rates, [f"{v:g}" for v in rates])
    left.minorticks_off()
    left.set_xlabel("learning rate")
    left.set_ylabel("bits per byte")
    right.set_xlabel("rates tried")
    right.set_title("expected best of n")
    right.set_xticks(range(1, max(len(r["best_of_n"]) for r in records) + 1))
    legend(figure, c.styles, lines=True, columns=3)
    view.figures.append(("learning_rates", "Sensitivity to the learning rate, and what tuning effort buys", figure))


def cost(c: Context) -> View:
    """Units, parameters, FLOPs, tokens and measured time of every arm."""
    view = View("cost", "Cost", "What does each arm cost, in units, parameters, arithmetic and measured time?")
    rows = [
        {
            "arm": a["label"],
            **{
                k: a[k]
                for k in (
                    "total_units",
                    "active_units",
                    "active_frac",
                    "total_params",
                    "active_params",
                    "flops_per_token",
                    "tokens",
                    "seconds",
                    "tokens_per_second",
                )
            },
            "bpb": a["bpb"]["mean"] if a["bpb"] else None,
            "n": a["n"],
            "runs": a["run_ids"],
        }
        for a in c.findings["arms"]
    ]
    columns = [
        Column("arm", "arm"),
        Column("bpb", "bpb", ".4f"),
        Column("total_units", "units", ",.0f"),
        Column("active_units", "active units", ",.0f"),
        Column("active_frac", "active share", ".1%"),
        Column("total_params", "parameters", ",.0f"),
        Column("active_params", "active parameters", ",.0f"),
        Column("flops_per_token", "FLOPs a token", ",.0f"),
        Column("tokens", "training tokens", ",.0f"),
        Column("seconds", "seconds", ",.1f"),
        Column("tokens_per_second", "tokens/s", ",.0f"),
        Column("n", "n", "d"),
        Column("runs", "runs", "runs"),
    ]
    view.tables.append(
        Table("cost", "Counts are exact; time is measured on the machines named below, means over seeds", columns, rows)
    )
    known = [r for r in rows if r["bpb"] is not None and r["flops_per_token"] is not None]
    if not known:
        view.missing = f"No finished run with costs: run `ablate study run studies/{c.tables.name}.yaml`."
        return view
    figure = new(7.2, 4.0)
    left, right = figure.subplots(1, 2, sharey=True)
    drawn = [
        a
        for a in c.findings["arms"]
        if a["bpb"] and a["flops_per_token"] is not None and (len(known) <= 60 or a["arm"] in c.shown)
    ]
    finite = np.array([a["bpb"]["mean"] for a in drawn if not a["statuses"].get("diverged")])
    for a in drawn:
        for ax, key in ((left, "flops_per_token"), (right, "tokens_per_second")):
            if a[key] is not None:
                ax.plot(a[key], a["bpb"]["mean"], linestyle="none", markersize=7, **mark(c.styles.arms[a["arm"]]))
    if len(finite):
        pad = 0.08 * max(float(np.ptp(finite)), 1e-3)
        left.set_ylim(float(finite.min()) - pad, float(finite.max()) + pad)
    left.set_xlabel("FLOPs a token (forward)")
    left.set_ylabel("bits per byte")
    right.set_xlabel("training tokens a second, measured")
    few_ticks(left, right, count=4)
    left.ticklabel_format(axis="x", style="sci", scilimits=(6, 6))
    legend(figure, c.styles, columns=3)
    view.figures.append(("cost", "Quality against arithmetic and against measured speed, arm means", figure))
    tokens = sorted({r["tokens"] for r in known if r["tokens"] is not None})
    view.reading.append(f"Training tokens a run: {', '.join(f'{t:,.0f}' for t in tokens[:5])}.")
    view.reading.append("Time depends on the machine, its load and the threads; compare only runs of one machine type.")
    view.data["cost_points"] = pl.DataFrame(
        [{k: r[k] for k in ("arm", "bpb", "flops_per_token", "tokens_per_second", "seconds")} for r in known]
    )
    return view
