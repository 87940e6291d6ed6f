"""What a policy comes to, cell by cell, and what changes from one policy to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from psa_vlm.policy.files import Source
from psa_vlm.policy.policy import Policy
from psa_vlm.taxonomy import Taxonomy

STYLES = {"allow": "green", "hint": "yellow", "refuse": "red"}


@dataclass(frozen=True)
class Change:
    """One thing that differs between two policies; None stands where a policy has nothing.

    Attributes:
        what: "privacy.high" for a cell, or a key such as "refusal" or "tenants.acme.off".
        before: in the first policy.
        after: in the second.
    """

    what: str
    before: Any
    after: Any

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def diff(first: Policy, second: Policy, taxonomy: Taxonomy) -> list[Change]:
    """The cells, thresholds and texts that differ, and what tenants change for themselves."""
    before, after = _facts(first, taxonomy), _facts(second, taxonomy)
    return [
        Change(what, before.get(what), after.get(what))
        for what in {**before, **after}
        if before.get(what) != after.get(what)
    ]


def to_dict(policy: Policy, taxonomy: Taxonomy) -> dict[str, Any]:
    """The whole policy for a program: every cell and every text with its source. JSON-ready."""
    cells = []
    for name in taxonomy.risk_types:
        for level in taxonomy.levels[1:]:
            rule = policy.rule(name, level)
            told = rule._asdict() if rule else {"name": None, "action": None, "source": None}
            source = asdict(told["source"]) if told["source"] else None
            cell = {"type": name, "level": level, "action": told["action"]}
            cells.append({**cell, "rule": told["name"], "source": source})
    texts = {}
    for key, text in _texts(policy).items():
        at = policy.source(*key)
        texts[".".join(key)] = {"text": text, "source": asdict(at) if at else None}
    return {
        "name": policy.name,
        "hash": policy.hash,
        "cells": cells,
        "thresholds": policy.thresholds,
        "texts": texts,
        "tenants": list(policy.tenants),
    }


def view(policy: Policy, taxonomy: Taxonomy) -> Group:
    """The same for people: a table of actions and one of texts, with where each is written."""
    title = f"policy {escape(policy.name)}"
    actions = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in ("type", *taxonomy.levels[1:], *(["threshold"] if policy.thresholds else [])):
        actions.add_column(column)
    for name in taxonomy.risk_types:
        cells = []
        for level in taxonomy.levels[1:]:
            rule = policy.rule(name, level)
            if rule is None:
                cells.append("[bold red]none[/]")
                continue
            off = " (off)" if name in policy.off else ""
            cells.append(f"[{STYLES[rule.action]}]{rule.action}{off}[/]{_at(rule.source)}")
        if name in policy.thresholds:
            at = policy.source("thresholds", name)
            cells.append(f"{policy.thresholds[name]:g}{_at(at)}")
        actions.add_row(escape(taxonomy.label(name)), *cells)
    texts = Table("text", "", "from", box=box.SIMPLE_HEAD)
    for key, text in _texts(policy).items():
        texts.add_row(escape(".".join(key)), escape(text), _at(policy.source(*key)).strip())
    tenants = ", ".join(policy.tenants) or "none"
    return Group(actions, texts, f"tenants: {escape(tenants)}; hash: {policy.hash}")


def diff_table(changes: list[Change]) -> Table:
    """The changes, one a row."""
    table = Table("what", "before", "after", box=box.SIMPLE_HEAD)
    for change in changes:
        sides = (_shown(change.before), _shown(change.after))
        table.add_row(escape(change.what), *sides)
    return table


def _facts(policy: Policy, taxonomy: Taxonomy) -> dict[str, Any]:
    """All that a policy does and says, under one name each."""
    facts: dict[str, Any] = {}
    for name in taxonomy.risk_types:
        for level in taxonomy.levels[1:]:
            rule = policy.rule(name, level)
            facts[f"{name}.{level}"] = rule and rule.action
    facts |= {f"thresholds.{name}": least for name, least in policy.thresholds.items()}
    facts |= {".".join(key): text for key, text in _texts(policy).items()}
    for name, changes in policy.tenants.items():
        facts[f"tenants.{name}"] = "named"
        facts |= {".".join(("tenants", name, *key)): value for key, value in _flat(changes).items()}
    return facts


def _texts(policy: Policy) -> dict[tuple[str, ...], str]:
    keys = {"hints", "refusal", "refusal_error", "languages"}
    return _flat(policy.model_dump(include=keys))


def _flat(data: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Nested mappings as one, by the path to each value; a list is one value."""
    flat: dict[tuple[str, ...], Any] = {}
    for name, value in data.items():
        inner = isinstance(value, Mapping)
        flat |= _flat(value, (*path, name)) if inner else {(*path, name): value}
    return flat


def _at(source: Source | None) -> str:
    return f"\n[dim]{escape(Path(source.file).name)}:{source.line}[/]" if source else ""


def _shown(value: Any) -> str:
    if value is None:
        return "[dim]nothing[/]"
    return escape(", ".join(value) if isinstance(value, tuple) else f"{value}")
