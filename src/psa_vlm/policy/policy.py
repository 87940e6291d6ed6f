"""Policies: a YAML file that turns a verdict into allow, hint or refuse, and fails closed."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from psa_vlm.errors import PolicyError
from psa_vlm.model.verdict import Verdict
from psa_vlm.strict_yaml import StrictLoader
from psa_vlm.taxonomy import Taxonomy

Action = Literal["allow", "hint", "refuse"]
SEVERITY: tuple[Action, ...] = get_args(Action)
"""The actions, the mildest first."""

ANY = "*"
VERDICT_ERROR = "verdict-error"
"""The rule of a refusal because the verdict could not be computed."""


@dataclass(frozen=True)
class Decision:
    """What is done with a request, and why.

    Attributes:
        action: allow, hint or refuse.
        rule: what fired: "privacy.high", "*.low", "off.privacy", "clean" or "verdict-error".
        type: the risk type that decided, None if there was none.
        level: its level.
        hint: the sentence for the language model, if the action is hint.
        refusal: the reply to the user, if the action is refuse.
        reason: why, for the record; None where nothing was found.
    """

    action: Action
    rule: str
    type: str | None = None
    level: str | None = None
    hint: str | None = None
    refusal: str | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class Policy(BaseModel):
    """An operator's rules; see `policies/default.yaml` for each key in plain words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    rules: dict[str, dict[str, Action]]
    off: tuple[str, ...] = ()
    hints: dict[str, str]
    refusal: str
    refusal_error: str

    @field_validator("hints")
    @classmethod
    def _hints_are_templates(cls, hints: dict[str, str]) -> dict[str, str]:
        for level, text in hints.items():
            _check_template(text, ("type", "level"), f"{level}: ")
        return hints

    @field_validator("refusal")
    @classmethod
    def _refusal_is_a_template(cls, text: str) -> str:
        return _check_template(text, ("type", "level", "reason"))

    @field_validator("refusal_error")
    @classmethod
    def _refusal_error_is_a_template(cls, text: str) -> str:
        return _check_template(text, ("reason",))

    @classmethod
    def default(cls) -> Policy:
        """The shipped policy: the paper's behaviour, a hint at every level above safe."""
        text = (resources.files("psa_vlm") / "policies" / "default.yaml").read_text("utf-8")
        return cls.from_text(text, "policies/default.yaml")

    @classmethod
    def from_yaml(cls, path: str | Path) -> Policy:
        """Read a policy file.

        Raises:
            PolicyError: one line for each thing that is wrong, naming the file and the key.
        """
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(f"{path}: can not read the policy: {error}") from error
        return cls.from_text(text, str(path))

    @classmethod
    def from_text(cls, text: str, where: str = "policy") -> Policy:
        """Read a policy from YAML text; `where` names it in errors, which are `from_yaml`'s."""
        try:
            data = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            told = " ".join(str(error).split())
            fix = ' (write "*" with its quotes)' if "alias" in told else ""
            raise PolicyError(f"{where}: not valid YAML: {told}{fix}") from error
        if not isinstance(data, dict):
            keys = ", ".join(cls.model_fields)
            raise PolicyError(f"{where}: a policy is a mapping with the keys {keys}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            lines = [f"{where}: {_explain(one, cls.model_fields)}" for one in error.errors()]
            raise PolicyError("\n".join(lines)) from None

    def to_yaml(self, path: str | Path) -> None:
        """Write the policy so that `from_yaml` reads the same one."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, "utf-8")

    @property
    def hash(self) -> str:
        """Content hash: equal policies have equal hashes."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self, taxonomy: Taxonomy) -> None:
        """See that the policy fits the taxonomy: known names, an action and a hint for every case.

        Raises:
            PolicyError: one line for each thing that is wrong, naming the policy and the key.
        """
        risks, levels = taxonomy.risk_types, taxonomy.levels
        wrong = []
        for name, actions in self.rules.items():
            if name not in (ANY, *risks):
                wrong.append(f"rules.{name}: not a risk type; use one of {ANY}, {', '.join(risks)}")
            for level, action in actions.items():
                if level not in levels:
                    known = ", ".join(levels)
                    wrong.append(f"rules.{name}.{level}: not a level; use one of {known}")
                elif level == taxonomy.safe_level and action != "allow":
                    wrong.append(f"rules.{name}.{level}: the level {level} is always allowed")
        for name in self.off:
            if name not in risks:
                wrong.append(f"off: '{name}' is not a risk type; use one of {', '.join(risks)}")
        for level in self.hints:
            if level not in levels:
                wrong.append(f"hints.{level}: not a level; use one of {', '.join(levels)}")
        for level in levels:
            if level == taxonomy.safe_level:
                continue
            actions_here = {name: self._rule(name, level) for name in risks}
            if missing := [name for name, rule in actions_here.items() if rule is None]:
                wrong.append(
                    f"rules: no action at level {level} for {', '.join(missing)}; "
                    f'add {level} to each, or to "{ANY}"'
                )
            hinted = any(rule and rule[1] == "hint" for rule in actions_here.values())
            if hinted and level not in self.hints:
                wrong.append(f"hints.{level}: a rule hints at level {level}; write its text")
        if wrong:
            raise PolicyError("\n".join(f"policy {self.name}: {line}" for line in wrong))

    def decide(self, verdict: Verdict, taxonomy: Taxonomy) -> Decision:
        """Turn a verdict into a decision.

        The most severe action over the concepts wins; of equals, the higher level, then the type
        that the taxonomy names first. Whatever goes wrong, here or in the verdict, is a refusal
        under the rule "verdict-error".
        """
        try:
            self.check(taxonomy)
            if problem := verdict.problem(taxonomy):
                return self._refuse_error(problem)
            return self._decide(verdict.concepts, taxonomy)
        except Exception as error:
            return self._refuse_error(f"{type(error).__name__}: {error}")

    def _decide(self, concepts: Mapping[str, str], taxonomy: Taxonomy) -> Decision:
        found: list[tuple[tuple[int, int, int], Action, str, str, str]] = []
        for order, name in enumerate(taxonomy.risk_types):
            level = concepts[name]
            if level == taxonomy.safe_level:
                continue
            fired = self._rule(name, level)
            if fired is None:
                raise PolicyError(f"policy {self.name}: no action for {name} at level {level}")
            rule, action = fired
            key = (SEVERITY.index(action), taxonomy.level_id(level), -order)
            found.append((key, action, rule, name, level))
        if not found:
            return Decision("allow", "clean")
        _, action, rule, name, level = max(found)
        words = {"type": taxonomy.label(name), "level": level}
        reason = f"{words['type']} at level {level}"
        return Decision(
            action,
            rule,
            name,
            level,
            hint=self.hints[level].format(**words) if action == "hint" else None,
            refusal=self.refusal.format(**words, reason=reason) if action == "refuse" else None,
            reason=reason,
        )

    def _rule(self, name: str, level: str) -> tuple[str, Action] | None:
        """The rule for a risk type at a level: switched off, its own, or that of every type."""
        if name in self.off:
            return f"off.{name}", "allow"
        for key in (name, ANY):
            action = self.rules.get(key, {}).get(level)
            if action is not None:
                return f"{key}.{level}", action
        return None

    def _refuse_error(self, reason: str) -> Decision:
        refusal = self.refusal_error.format(reason=reason)
        return Decision("refuse", VERDICT_ERROR, refusal=refusal, reason=reason)


class _Loader(StrictLoader):
    """YAML in which `off`, `on`, `yes` and `no` are words."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, regex) for tag, regex in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _check_template(text: str, known: tuple[str, ...], where: str = "") -> str:
    if not text.strip():
        raise ValueError(f"{where}the text is empty")
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{where}{error}; write {{{{ and }}}} for braces") from None
    for _, name, spec, conversion in parts:
        if name is not None and (name not in known or spec or conversion):
            names = ", ".join(f"{{{one}}}" for one in known)
            raise ValueError(f"{where}{{{name}}} is not known here; use {names}")
    return text


def _explain(error: Any, fields: Mapping[str, Any]) -> str:
    """One pydantic error in the words of the file."""
    key = ".".join(map(str, error["loc"]))
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key '{key}'; known keys: {', '.join(fields)}"
        case "missing":
            return f"the key '{key}' is missing"
        case "literal_error":
            return f"{key}: '{error['input']}' is not an action; use one of {', '.join(SEVERITY)}"
        case "value_error":
            return f"{key}: {error['ctx']['error']}"
        case _:
            return f"{key}: {error['msg']}, got {error['input']!r}"
