"""The report's charts as Plotly figures in plain data.

Colours are the names of the page's own CSS variables ("--stage2"); the page puts in their values,
so that a chart follows its light and dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from psa_vlm.evaluation.scorecard import METHODS, Metric, Scorecard, format_ci, format_value
from psa_vlm.evaluation.scorers import Bin, Interval

Figure = dict[str, Any]
Series = dict[str, list[tuple[float, Interval]]]
"""Name -> points of a line: x, and a share with its interval."""

LINES = ("--stage2", "--bad", "--lora", "--system_prompt", "--base", "--stage1")


def bars(scorecard: Scorecard, metric: Metric) -> Figure:
    """One group of bars for each split, one bar for each method, with 95% intervals."""
    data = []
    top = 0.1
    for method, label in METHODS.items():
        rows = [row for row in scorecard.rows if row.method == method and metric in row.ci]
        if not rows:
            continue
        found = [Interval(row.value(metric) or 0.0, *row.ci[metric], row.n) for row in rows]
        top = max(top, *(one.high for one in found))
        data.append(
            {
                "type": "bar",
                "name": label,
                "x": [row.split for row in rows],
                "y": [one.value for one in found],
                "marker": {"color": f"--{method}"},
                "error_y": error_bars(found, "--muted"),
                "hovertext": [
                    f"{label}: {format_value(metric, row.value(metric))} ({format_ci(row, metric)})"
                    for row in rows
                ],
                "hoverinfo": "text",
            }
        )
    layout = plain_layout(height=250)
    layout["xaxis"] |= {"categoryorder": "array", "categoryarray": scorecard.splits}
    layout["yaxis"] |= {"tickformat": ".0%", "range": [0, min(top * 1.08, 1.04)]}
    return {"data": data, "layout": layout | {"barmode": "group", "bargap": 0.28}}


def curve(steps: list[int], values: list[float]) -> Figure:
    """A training curve; a value that is not finite is a gap."""
    line = {
        "type": "scatter",
        "mode": "lines" if len(steps) > 1 else "markers",
        "x": steps,
        "y": [value if math.isfinite(value) else None for value in values],
        "line": {"color": "--accent", "width": 2},
        "marker": {"color": "--accent"},
        "hovertemplate": "step %{x}: %{y:.4g}<extra></extra>",
    }
    layout = plain_layout(height=190)
    layout["xaxis"] |= {"nticks": 5}
    layout["yaxis"] |= {"nticks": 5, "rangemode": "tozero"}
    return {"data": [line], "layout": layout}


def shares(series: Series, title: str, log: bool = False) -> Figure:
    """Shares with 95% intervals over a quantity that `title` names, one line for each name.

    With `log` the x axis is logarithmic, with a tick at every point.
    """
    data = []
    named = [(name, points) for name, points in series.items() if points]
    for index, (name, points) in enumerate(named):
        colour = LINES[index % len(LINES)]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": [x for x, _ in points],
                "y": [one.value for _, one in points],
                "line": {"color": colour, "width": 2},
                "marker": {"color": colour},
                "error_y": error_bars([one for _, one in points], colour),
                "hovertext": [_told(name, one) for _, one in points],
                "hoverinfo": "text",
            }
        )
    layout = plain_layout(height=300)
    layout["xaxis"] |= {"title": {"text": title}, "nticks": 6}
    if log:
        ticks = sorted({x for points in series.values() for x, _ in points})
        layout["xaxis"] |= {
            "type": "log",
            "tickvals": ticks,
            "ticktext": [f"{x:.2g}" for x in ticks],
        }
    layout["yaxis"] |= {"tickformat": ".0%", "range": [-0.02, 1.04]}
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    return {"data": data, "layout": layout | {"showlegend": len(named) > 1, "legend": legend}}


def dots(points: Mapping[str, Interval]) -> Figure:
    """Figures with their 95% intervals side by side, one row for each name, the first on top."""
    found = list(points.values())
    data = {
        "type": "scatter",
        "mode": "markers",
        "x": [one.value for one in found],
        "y": list(points),
        "marker": {"color": "--accent", "size": 9},
        "error_x": error_bars(found, "--accent"),
        "hovertext": [_told(name, one) for name, one in points.items()],
        "hoverinfo": "text",
    }
    layout = plain_layout(height=70 + 26 * len(found))
    layout["xaxis"] |= {"tickformat": "~%", "showgrid": True, "nticks": 5, "tickangle": 0}
    layout["yaxis"] |= {"autorange": "reversed", "type": "category"}
    return {"data": [data], "layout": layout}


def reliability(bins: list[Bin]) -> Figure:
    """Accuracy against confidence over how many predictions each bin holds."""
    filled = [one for one in bins if one.n]
    middle = [(one.low + one.high) / 2 for one in filled]
    width = bins[0].high - bins[0].low
    common = {"type": "bar", "x": middle, "width": width * 0.92, "hoverinfo": "text"}
    accuracy = common | {
        "y": [one.accuracy for one in filled],
        "marker": {"color": "--stage1"},
        "hovertext": [
            f"confidence {one.confidence:.3f}, right {one.accuracy:.3f}, n {one.n:,}"
            for one in filled
        ],
    }
    counts = common | {
        "y": [one.n for one in filled],
        "yaxis": "y2",
        "marker": {"color": "--base"},
        "text": [f"{one.n:,}" for one in filled],
        "textposition": "outside",
        "cliponaxis": False,
        "textfont": {"color": "--muted"},
        "hovertext": [f"{one.n:,} predictions" for one in filled],
    }
    ideal = {
        "type": "scatter",
        "mode": "lines",
        "x": [0, 1],
        "y": [0, 1],
        "line": {"color": "--ink", "width": 1.5, "dash": "dot"},
        "hoverinfo": "skip",
    }
    layout = plain_layout(height=360)
    layout["xaxis"] |= {"range": [0, 1], "title": {"text": "confidence"}, "anchor": "y2"}
    layout["yaxis"] |= {"range": [0, 1.03], "domain": [0.34, 1], "title": {"text": "right"}}
    most = max((one.n for one in filled), default=1)
    second = {"domain": [0, 0.2], "range": [0, most * 1.5], "title": {"text": "n"}, "nticks": 3}
    layout["yaxis2"] = layout["yaxis"] | second
    return {"data": [accuracy, ideal, counts], "layout": layout}


class Ranged(Protocol):
    """A figure with its interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def error_bars(points: Sequence[Ranged], colour: str) -> Figure:
    """Plotly's error bars, one for each point."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [one.high - one.value for one in points],
        "arrayminus": [one.value - one.low for one in points],
        "color": colour,
        "thickness": 1.2,
        "width": 3,
    }


def plain_layout(height: int) -> Figure:
    """What every chart has in common."""
    axis = {
        "gridcolor": "--line",
        "linecolor": "--line",
        "zerolinecolor": "--line",
        "automargin": True,
        "fixedrange": True,
    }
    return {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "--muted", "size": 12, "family": "system-ui, sans-serif"},
        "hoverlabel": {
            "bgcolor": "--card",
            "bordercolor": "--line",
            "font": {"color": "--ink"},
        },
        "showlegend": False,
        "xaxis": axis | {"showgrid": False},
        "yaxis": dict(axis),
    }


def _told(name: str, one: Interval) -> str:
    return f"{name}: {one.value:.1%} ({one.low:.1%}-{one.high:.1%}), n {one.n}"
