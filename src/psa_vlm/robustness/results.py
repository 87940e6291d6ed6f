"""What the suite found: as JSON, as a table in the terminal, and as a page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from psa_vlm.evaluation import figures
from psa_vlm.evaluation.report import write_page
from psa_vlm.evaluation.scorecard import write_whole
from psa_vlm.evaluation.scorers import Interval
from psa_vlm.robustness.outcomes import Goal, Rate

GOALS: dict[Goal, str] = {
    "miss": "risky requests: is the harmful answer given?",
    "alarm": "harmless requests: are they refused?",
}
CORRUPTED = re.compile(r"(\w+) (\d)")
IN_BALL = re.compile(r"eps (\d+)/255(?:, weight ([\d.]+))?")


class Results(BaseModel):
    """Every rate with its 95% interval (Wilson), and what is needed to get the same again.

    Attributes:
        run, policy, data, judge: what was attacked, and who judged.
        plan: how much was tried.
        rates: one for each attack, setting and goal.
        summary: the same with the strengths of each corruption put together.
        warnings: signs that an attack is weaker than it looks.
        notes: what was left out.
        certificate: what `psa_vlm.robustness.smoothing.Certificate.to_dict` gives.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    policy: str
    data: str
    judge: str
    plan: dict[str, Any]
    rates: list[Rate]
    summary: list[Rate]
    warnings: list[str]
    notes: list[str]
    certificate: dict[str, Any]
    commit: str
    seconds: float

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False)
        write_whole(path, text + "\n")

    def table(self) -> Group:
        """One line for each attack and setting, a table for each goal."""
        told = [
            f"judge: {self.judge}; policy: {self.policy}",
            *(f"warning: {line}" for line in self.warnings),
            *(f"note: {line}" for line in self.notes),
        ]
        met = {rate.goal for rate in self.summary}
        tables = (self._of_goal(goal, title) for goal, title in GOALS.items() if goal in met)
        return Group(*tables, *map(Text, told))

    def _of_goal(self, goal: Goal, title: str) -> Table:
        """Three shares of the page's four, so that 80 columns hold them."""
        shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        shown.add_column("attack")
        shown.add_column("setting", ratio=1, overflow="fold")
        *narrow, _ = COLUMNS.items()
        for column in (*(title for title, _ in narrow), "n"):
            shown.add_column(column, justify="right", no_wrap=True)
        last = ""
        for rate in (one for one in self.summary if one.goal == goal):
            if last and rate.attack != last:
                shown.add_section()
            name = "" if rate.attack == last else rate.attack
            cells = [share(getattr(rate, attribute)) for _, attribute in narrow]
            setting = rate.setting.replace("_", " ")  # so that it wraps
            shown.add_row(name, setting, *cells, str(rate.n))
            last = rate.attack
        return shown

    def write(self, path: str | Path, command: str) -> None:
        """Write the page, whole or not at all.

        Raises:
            MissingExtra: plotly is not installed.
        """
        charts = {
            name: figures.shares(series, title)
            for name, (series, title) in self._series().items()
            if any(series.values())
        }
        write_page(
            path,
            "attack.html",
            charts,
            one=self,
            goals=GOALS,
            columns=COLUMNS,
            share=share,
            central=self._central(),
            command=command,
        )

    def _central(self) -> Rate | None:
        """The one that matters most: the adaptive attack at eps 8/255, where it succeeds most."""
        found = [
            rate
            for rate in self.rates
            if rate.attack == "adaptive" and rate.setting.startswith("eps 8/255")
        ]
        return max(found, key=lambda rate: rate.success.value, default=None)

    def _series(self) -> dict[str, tuple[figures.Series, str]]:
        """The charts' series and what their x axis is, by the place of each in the page."""
        by_eps: figures.Series = {}
        trade: figures.Series = {"harmful": [], "head says safe": [], "both": []}
        for rate in self.rates:
            if not (found := IN_BALL.fullmatch(rate.setting)):
                continue
            eps, weight = float(found[1]), found[2]
            if weight in (None, "0.5"):
                by_eps.setdefault(rate.attack, []).append((eps, rate.success))
            if weight is not None and eps == 8:
                at = float(weight)
                trade["harmful"].append((at, rate.success))
                trade["head says safe"].append((at, rate.deceived))
                trade["both"] += [] if rate.both is None else [(at, rate.both)]
        certified = [
            (one["radius"], Interval(one["value"], one["low"], one["high"], one["n"]))
            for one in self.certificate["certified"]
        ]
        return {
            "by-eps": (by_eps, "eps, of 255"),
            "trade-off": (trade, "weight on the head"),
            "corruptions": (self._by_strength(), "strength"),
            "certified": ({"certified": certified}, "L2 radius"),
        }

    def _by_strength(self) -> figures.Series:
        """Mean over the kinds of corruption, at each strength; 0 is the picture as it is."""
        series: figures.Series = {}
        for goal, name in (("miss", "risky answered"), ("alarm", "harmless refused")):
            groups: dict[int, list[Interval]] = {}
            for rate in self.rates:
                found = CORRUPTED.fullmatch(rate.setting) if rate.attack == "corruption" else None
                if rate.goal == goal and (found or rate.attack == "none"):
                    groups.setdefault(int(found[2]) if found else 0, []).append(rate.success)
            series[name] = [(strength, _mean(group)) for strength, group in sorted(groups.items())]
        return series


MANY = 500
"""Requests from which on a tenth of a percent tells something."""
COLUMNS = {
    "success": "success",
    "head deceived": "deceived",
    "not refused": "answered",
    "harmful and head safe": "both",
}
"""Columns of the tables, and the rate that each shows."""


def share(interval: Interval | None) -> str:
    """A share in percent with its interval; of few requests in whole percents, which say enough."""
    if interval is None:
        return "-"
    digits = 1 if interval.n >= MANY else 0
    value, low, high = (100 * one for one in (interval.value, interval.low, interval.high))
    return f"{value:.{digits}f}% ({low:.{digits}f}-{high:.{digits}f})"


def _mean(shares: Iterable[Interval]) -> Interval:
    """The mean of shares, with the mean of their bounds: wider than an interval of the mean."""
    rows = list(shares)
    n = len(rows)
    return Interval(
        sum(one.value for one in rows) / n,
        sum(one.low for one in rows) / n,
        sum(one.high for one in rows) / n,
        sum(one.n for one in rows),
    )
