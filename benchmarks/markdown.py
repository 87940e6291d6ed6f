"""Print a scorecard as the Markdown tables of docs/results.md.

python benchmarks/markdown.py runs/demo/scorecard.json
"""

from __future__ import annotations

import sys

from psa_vlm.evaluation.scorecard import (
    METHODS,
    METRICS,
    SPLITS,
    Metric,
    Row,
    Scorecard,
    format_ci,
    format_value,
)


def main(path: str) -> None:
    card = Scorecard.load(path)
    for split in card.splits:
        print(f"\n**{split}**: {SPLITS[split]}\n")
        print(f"| method | {' | '.join(METRICS.values())} | n |")
        print("|---|" + "---|" * (len(METRICS) + 1))
        for row in card.rows:
            if row.split == split:
                cells = [_cell(row, metric) for metric in METRICS]
                print(f"| {METHODS[row.method]} | {' | '.join(cells)} | {row.n:,} |")
    print(f"\nSeed {card.seed}, commit {card.commit}, {card.seconds:,.0f} s.")


def _cell(row: Row, metric: Metric) -> str:
    interval = format_ci(row, metric)
    value = format_value(metric, row.value(metric))
    return f"{value} ({interval})" if interval else value


if __name__ == "__main__":
    main(sys.argv[1])
