"""Policies: a YAML file that turns a verdict into allow, hint or refuse, and fails closed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr

from psa_vlm.errors import PolicyError
from psa_vlm.model.verdict import ImageVerdict, Verdict
from psa_vlm.policy import files, schema
from psa_vlm.policy.files import Key, Source
from psa_vlm.policy.schema import ANY, SEVERITY, Action
from psa_vlm.taxonomy import Taxonomy

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
        source: file and line of the rule, and its comment; None for a rule of no file.
    """

    action: Action
    rule: str
    type: str | None = None
    level: str | None = None
    hint: str | None = None
    refusal: str | None = None
    reason: str | None = None
    source: Source | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class Rule(NamedTuple):
    """What is done for one risk type at one level; `name` and `source` are a decision's."""

    name: str
    action: Action
    source: Source | None


class Policy(BaseModel):
    """An operator's rules with all they inherit; docs/policy.md has each key in plain words.

    Policies with equal rules, texts and tenants are equal, wherever they were written.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    rules: schema.Rules
    off: tuple[str, ...] = ()
    thresholds: schema.Thresholds = {}
    hints: schema.Hints
    refusal: schema.Refusal
    refusal_error: schema.RefusalError
    languages: dict[schema.Tag, schema.Language] = {}
    tenants: dict[str, schema.Overrides] = {}
    _sources: dict[Key, Source] = PrivateAttr(default_factory=dict)
    _files: tuple[str, ...] = PrivateAttr(default=())

    # --- where policies come from ----------------------------------------------------------------

    @classmethod
    def default(cls) -> Policy:
        """The shipped policy: the paper's behaviour, a hint at every level above safe."""
        return cls.shipped("default")

    @classmethod
    def shipped(cls, name: str) -> Policy:
        """A policy that comes with the package, by name.

        Raises:
            PolicyError: there is none of this name.
        """
        return cls._of(files.read_shipped(name))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Policy:
        """Read a policy file, and the files that it inherits.

        Raises:
            PolicyError: a line for each thing that is wrong: the file, the line, and the fix.
        """
        return cls._of(files.read_file(Path(path)))

    @classmethod
    def from_text(cls, text: str, where: str = "policy") -> Policy:
        """Read a policy from YAML text, which may inherit from shipped policies alone.

        `where` names it in errors, which are `from_yaml`'s.
        """
        return cls._of(files.read_text(text, where))

    @classmethod
    def load(cls, name_or_path: str | Path) -> Policy:
        """A shipped policy by its name, or else a file; errors are `from_yaml`'s."""
        names = files.shipped_names()
        if str(name_or_path) in names:
            return cls.shipped(str(name_or_path))
        if not Path(name_or_path).exists():
            known = ", ".join(names)
            raise PolicyError(f"{name_or_path}: no such file, and no shipped policy ({known})")
        return cls.from_yaml(name_or_path)

    @classmethod
    def _of(cls, document: files.Document) -> Policy:
        policy = cls.model_validate(document.data)
        policy._sources, policy._files = document.sources, document.files
        return policy

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """The JSON Schema of a policy file, for editors."""
        return schema.json_schema()

    def to_yaml(self, path: str | Path) -> None:
        """Write the policy, with all that it inherits, so that `from_yaml` reads the same one.

        The comments about its actions are kept.
        """
        data = self.model_dump(mode="json")
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        Path(path).write_text(files.commented(text, self._sources), "utf-8")

    def for_tenant(self, name: str) -> Policy:
        """The policy of one tenant: this one under what the tenant changes.

        Raises:
            PolicyError: the policy does not name this tenant.
        """
        if name not in self.tenants:
            known = ", ".join(self.tenants) or "none"
            raise PolicyError(
                f"policy {self.name}: no tenant '{name}' (there are: {known}); "
                f"write 'tenants: {{{name}: {{}}}}' for one that changes nothing"
            )
        base = self.model_dump(exclude={"tenants"})
        changed = schema.merged(base, {**self.tenants[name], "name": f"{self.name}/{name}"})
        shared = {key: at for key, at in self._sources.items() if key[0] != "tenants"}
        own = {key[2:]: at for key, at in self._sources.items() if key[:2] == ("tenants", name)}
        return self._of(files.Document(changed, {**shared, **own}, self._files))

    @property
    def hash(self) -> str:
        """Content hash: equal policies have equal hashes."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.model_dump() == other.model_dump()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, changed without a check; what is changed no longer stands in a file."""
        copy = super().model_copy(update=update, deep=deep)
        changed = update or {}
        copy._sources = {key: at for key, at in self._sources.items() if key[0] not in changed}
        return copy

    # --- what they say ---------------------------------------------------------------------------

    def rule(self, type: str, level: str) -> Rule | None:
        """The rule for a risk type at a level: switched off, its own, or that of every type."""
        if type in self.off:
            return Rule(f"off.{type}", "allow", self.source("off", type))
        for name in (type, ANY):
            action = self.rules.get(name, {}).get(level)
            if action is not None:
                return Rule(f"{name}.{level}", action, self.source("rules", name, level))
        return None

    def source(self, *key: str) -> Source | None:
        """Where something is written, as in `source("rules", "privacy", "high")`, if known."""
        return self._sources.get(key)

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it was read from, those of the package by their place in it."""
        return self._files

    def texts(self, language: str | None = None) -> schema.Language:
        """Hints, refusals and words in a language ("de-AT" may be found as "de"), or the own."""
        own: schema.Language = {
            "hints": self.hints,
            "refusal": self.refusal,
            "refusal_error": self.refusal_error,
            "words": {},
        }
        known = {tag.casefold(): texts for tag, texts in self.languages.items()}
        tag = (language or "").replace("_", "-").casefold()
        while tag and tag not in known:
            tag = tag.rpartition("-")[0]
        texts: schema.Language = schema.merged(own, known.get(tag, {}))
        return texts

    def check(self, taxonomy: Taxonomy) -> None:
        """See that the policy fits the taxonomy: known names, an action and a hint for every case.

        Raises:
            PolicyError: one line for each thing that is wrong, naming the place and the key.
        """
        wrong = list(self._misfits(taxonomy))
        for name in self.tenants:
            new = (line for line in self.for_tenant(name)._misfits(taxonomy) if line not in wrong)
            wrong += new
        if wrong:
            raise PolicyError("\n".join(wrong))

    def _misfits(self, taxonomy: Taxonomy) -> Iterator[str]:
        """What does not fit the taxonomy, tenants left out."""
        risks, levels = taxonomy.risk_types, taxonomy.levels
        no_type = f"not a risk type; use one of {', '.join(risks)}"
        no_level = f"not a level; use one of {', '.join(levels)}"
        for name, actions in self.rules.items():
            if name not in (ANY, *risks):
                known = ", ".join((ANY, *risks))
                yield self._told(f"not a risk type; use one of {known}", "rules", name)
            for level, action in actions.items():
                if level not in levels:
                    yield self._told(no_level, "rules", name, level)
                elif level == taxonomy.safe_level and action != "allow":
                    told = f"the level {level} is always allowed; take it out"
                    yield self._told(told, "rules", name, level)
        for name in self.off:
            if name not in risks:
                yield self._told(no_type, "off", name)
        for name in self.thresholds:
            if name not in risks:
                yield self._told(no_type, "thresholds", name)
        for level in self.hints:
            if level not in levels:
                yield self._told(no_level, "hints", level)
        for tag, texts in self.languages.items():
            for level in texts.get("hints", {}):
                if level not in levels:
                    yield self._told(no_level, "languages", tag, "hints", level)
            for name in texts.get("words", {}):
                if name not in (*risks, *levels):
                    told = f"neither a risk type nor a level; use {', '.join((*risks, *levels))}"
                    yield self._told(told, "languages", tag, "words", name)
        for level in levels[1:]:
            rules = {name: self.rule(name, level) for name in risks}
            if missing := [name for name, rule in rules.items() if rule is None]:
                told = f"no action at level {level} for {', '.join(missing)}; add {level} to each"
                yield self._told(f'{told}, or to "{ANY}"', "rules")
            hinted = any(rule and rule.action == "hint" for rule in rules.values())
            if hinted and level not in self.hints:
                yield self._told(f"a rule hints at level {level}; write its text", "hints", level)

    def _told(self, wrong: str, *key: str) -> str:
        """A line about `key` that begins with its place: file and line, or the policy's name."""
        beneath = (at for path, at in self._sources.items() if path[: len(key)] == key)
        return f"{next(beneath, f'policy {self.name}')}: {'.'.join(key)}: {wrong}"

    # --- what they decide ------------------------------------------------------------------------

    def decide(self, verdict: Verdict, taxonomy: Taxonomy, language: str | None = None) -> Decision:
        """Turn a verdict into a decision.

        The most severe action over the concepts wins; of equals, the higher level, then the type
        that the taxonomy names first. A risk type with a threshold is found by it, and the others
        are taken as the verdict has them. Whatever goes wrong, here or in the verdict, is a refusal
        under the rule "verdict-error".

        Args:
            verdict: of the request.
            taxonomy: that the verdict was made with.
            language: of the texts, as in "de"; what the policy lacks in it is the default text.
        """
        try:
            if wrong := next(self._misfits(taxonomy), None):
                return self._refuse_error(wrong, language)
            if problem := verdict.problem(taxonomy):
                return self._refuse_error(problem, language)
            return self._decide(self._concepts(verdict, taxonomy), taxonomy, language)
        except Exception as error:
            return self._refuse_error(f"{type(error).__name__}: {error}", language)

    def _concepts(self, verdict: Verdict, taxonomy: Taxonomy) -> Mapping[str, str]:
        """The verdict's level of each risk type, by this policy's thresholds where it has them.

        A level that the caller gave (an intervention) stands.
        """
        found = {
            name: max(
                (level_at(image, name, least, taxonomy) for image in verdict.images),
                key=taxonomy.level_id,
            )
            for name, least in self.thresholds.items()
            if name not in verdict.overridden
        }
        return {**verdict.concepts, **found}

    def _decide(
        self, concepts: Mapping[str, str], taxonomy: Taxonomy, language: str | None
    ) -> Decision:
        found: list[tuple[tuple[int, int, int], Rule, str, str]] = []
        for order, name in enumerate(taxonomy.risk_types):
            level = concepts[name]
            if level == taxonomy.safe_level:
                continue
            rule = self.rule(name, level)
            if rule is None:
                raise PolicyError(f"policy {self.name}: no action for {name} at level {level}")
            key = (SEVERITY.index(rule.action), taxonomy.level_id(level), -order)
            found.append((key, rule, name, level))
        if not found:
            return Decision("allow", "clean")
        _, rule, name, level = max(found, key=lambda one: one[0])
        reason = f"{taxonomy.label(name)} at level {level}"
        texts = self.texts(language)
        words = {
            "type": texts["words"].get(name, taxonomy.label(name)),
            "level": texts["words"].get(level, level),
        }
        hint = texts["hints"][level].format(**words) if rule.action == "hint" else None
        refusal = (
            texts["refusal"].format(**words, reason=reason) if rule.action == "refuse" else None
        )
        return Decision(rule.action, rule.name, name, level, hint, refusal, reason, rule.source)

    def _refuse_error(self, reason: str, language: str | None) -> Decision:
        try:
            text = self.texts(language)["refusal_error"]
        except Exception:  # a language that is no word must not stand in the way of a refusal
            text = self.refusal_error
        return Decision("refuse", VERDICT_ERROR, refusal=text.format(reason=reason), reason=reason)


def level_at(image: ImageVerdict, type: str, threshold: float, taxonomy: Taxonomy) -> str:
    """The level of a risk type in one image under a threshold.

    Safe below the threshold; from it on the most probable level above safe, of equals the worst.
    """
    if image.scores(taxonomy)[type] < threshold:
        return taxonomy.safe_level
    return image.risky_level(taxonomy)
