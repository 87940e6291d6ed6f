"""What an evaluation gave: figures, judge by judge, and how far the judges agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from psa_vlm.errors import DataError
from psa_vlm.evaluation.agreement import Agreement, agreements
from psa_vlm.evaluation.measures import ALL, Figure, figures
from psa_vlm.evaluation.outcomes import method_of, outcomes

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog


class Results(BaseModel):
    """What an evaluation gave, and what is needed to get it again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    model: str
    method: str
    seed: int
    commit: str
    epochs: int
    requests: int
    failed: int
    log: str
    figures: list[Figure]
    agreements: list[Agreement]

    @classmethod
    def from_log(cls, log: EvalLog) -> Results:
        """Score a log that `psa_vlm.evaluation.running` wrote.

        Raises:
            DataError: it holds no samples, or was not written by us.
        """
        told = log.eval.metadata or {}
        if not log.samples or "seed" not in told:
            raise DataError(f"{log.location}: holds no samples of a psa-vlm evaluation")
        found = outcomes(log)
        return cls(
            task=log.eval.task,
            model=log.eval.model,
            method=method_of(log),
            seed=told["seed"],
            commit=told["commit"],
            epochs=max(sample.epoch for sample in log.samples),
            requests=len({sample.id for sample in log.samples}),
            failed=sum(sample.error is not None for sample in log.samples),
            log=log.location,
            figures=figures(found, told["seed"]),
            agreements=agreements(found),
        )

    def table(self) -> Group:
        """For the terminal, within 100 columns: figures, then how far the judges agree."""
        title = f"{self.task}: {self.model} ({self.method})"
        table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
        for name in ("measure", "group", "judge", "value", "95% interval", "n", "unscored"):
            right = name in ("value", "95% interval", "n", "unscored")
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for one in self.figures:
            value, interval = one.told
            cells = [one.measure, one.group, one.judge, value, interval, str(one.n)]
            table.add_row(*cells, str(one.unscored), style="bold" if one.group == ALL else "")
        used = " and ".join(sorted({one.interval for one in self.figures})) or "none"
        lines = [
            *map(str, self.agreements),
            f"intervals: {used}; seed {self.seed}; commit {self.commit}; epochs {self.epochs}",
        ]
        if self.failed:
            lines.append(f"{self.failed} requests failed and are unscored; the log says why")
        return Group(table, Text("\n".join(lines)))
