"""What a policy would have done with past requests, from the verdicts in their audit records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from psa_vlm.errors import PolicyError
from psa_vlm.model.verdict import Verdict
from psa_vlm.policy.overview import STYLES
from psa_vlm.policy.policy import VERDICT_ERROR, Decision, Policy
from psa_vlm.taxonomy import Taxonomy

EXAMPLES = 3
"""Requests that are named for each change."""


@dataclass(frozen=True)
class Side:
    """What a policy does: the action and the rule that fires."""

    action: str
    rule: str


@dataclass
class Change:
    """Requests on which two policies differ in the same way.

    Attributes:
        before: on record.
        after: under the new policy.
        count: how many requests.
        examples: some of their records in short: request, time, tenant, type, level and scores.
    """

    before: Side
    after: Side
    count: int
    examples: list[dict[str, Any]]


@dataclass(frozen=True)
class Replay:
    """What would change.

    Attributes:
        records: all that were read.
        same: on which the new policy does the same; another rule may be the reason.
        changes: the rest, the most frequent first.
        apart: why records could not be replayed -> how many.
    """

    records: int
    same: int
    changes: list[Change]
    apart: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def replay(
    records: Iterable[Mapping[str, Any]],
    policy: Policy,
    taxonomy: Taxonomy,
    examples: int = EXAMPLES,
) -> Replay:
    """Decide past requests anew.

    Each is decided as its tenant's, from the probabilities on record, which are rounded to six
    digits. What is not on record is not guessed: a failed request, a verdict of another taxonomy
    or a tenant whom the policy does not name is counted apart.

    Args:
        records: of an audit log.
        policy: the new one.
        taxonomy: of the verdicts.
        examples: how many requests to name for each change.
    """
    tenants: dict[str | None, Policy] = {None: policy}
    changes: dict[tuple[Side, Side], Change] = {}
    apart: Counter[str] = Counter()
    count = same = 0
    for record in records:
        count += 1
        found = _decided(record, policy, taxonomy, tenants)
        if isinstance(found, str):
            apart[found] += 1
            continue
        before = Side(record["decision"]["action"], record["decision"]["rule"])
        after = Side(found.action, found.rule)
        if before.action == after.action:
            same += 1
            continue
        change = changes.setdefault((before, after), Change(before, after, 0, []))
        change.count += 1
        if len(change.examples) < examples:
            change.examples.append(_short(record, found))
    ordered = sorted(changes.values(), key=lambda one: -one.count)
    return Replay(count, same, ordered, dict(apart.most_common()))


def _decided(
    record: Mapping[str, Any],
    policy: Policy,
    taxonomy: Taxonomy,
    tenants: dict[str | None, Policy],
) -> Decision | str:
    """What the policy does with a recorded request, or why that can't be told."""
    try:
        decision, tenant, data = record["decision"], record["tenant"], record["verdict"]
        if decision is None:
            return f"failed before it was decided ({record['error']['code']})"
        if tenant not in tenants:
            tenants[tenant] = policy.for_tenant(tenant)
        if data is None:  # no image, so that no policy decides
            return Decision(decision["action"], decision["rule"])
        verdict = Verdict.from_dict(data)
        if verdict.error is None and (problem := verdict.problem(taxonomy)):
            return f"a verdict that is not of this taxonomy ({problem})"
        if verdict.error is None and decision["rule"] == VERDICT_ERROR:
            return "refused for an error that its verdict does not show"
    except PolicyError:
        return f"the policy does not name the tenant {record['tenant']}"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"a record that is not whole ({type(error).__name__}: {error})"
    return tenants[tenant].decide(verdict, taxonomy)


def _short(record: Mapping[str, Any], found: Decision) -> dict[str, Any]:
    decision = record["decision"]
    return {
        "request": record["request"],
        "time": record["time"],
        "tenant": record["tenant"],
        "before": {name: decision[name] for name in ("type", "level")},
        "after": {"type": found.type, "level": found.level},
        "scores": record["scores"],
    }


def view(found: Replay) -> Group:
    """The same for people: a row for each change, and what was left out."""
    table = Table("before", "after", "requests", "for example", box=box.SIMPLE_HEAD)
    for change in found.changes:
        named = [f"{one['request']} ({one['time'][:19]}{_scored(one)})" for one in change.examples]
        sides = [_side(change.before), _side(change.after)]
        table.add_row(*sides, f"{change.count:,}", escape("\n".join(named)))
    changed = sum(change.count for change in found.changes)
    lines = [f"{found.records:,} records: {changed:,} change, {found.same:,} stay"]
    lines += [f"not replayed, {count:,}: {escape(why)}" for why, count in found.apart.items()]
    return Group(*([table] if found.changes else []), *lines)


def _side(side: Side) -> str:
    style = STYLES.get(side.action, "")
    action = escape(side.action)
    return f"{f'[{style}]{action}[/]' if style else action}\n[dim]{escape(side.rule)}[/]"


def _scored(example: Mapping[str, Any]) -> str:
    """The score of the risk type that decides, if one does."""
    name = example["after"]["type"] or example["before"]["type"]
    score = example["scores"].get(name)
    return "" if score is None else f", {name} {score:.3f}"
