"""What a policy file may hold: its keys, and the JSON Schema that lets an editor help."""

from __future__ import annotations

import string
from typing import Annotated, Any, Literal, Required, get_args

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, TypeAdapter
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

Action = Literal["allow", "hint", "refuse"]
SEVERITY: tuple[Action, ...] = get_args(Action)
"""The actions, the mildest first."""

ANY = "*"
"""The name that stands for every risk type."""
NEEDED = ("name", "rules", "hints", "refusal", "refusal_error")
"""The keys of a file that inherits from none."""


def _template(*known: str) -> AfterValidator:
    """A text in which only these names stand in braces."""

    def check(text: str) -> str:
        if not text.strip():
            raise ValueError("the text is empty; write one")
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{error}; write {{{{ and }}}} for braces") from None
        for _, name, spec, conversion in parts:
            if name is not None and (name not in known or spec or conversion):
                names = ", ".join(f"{{{one}}}" for one in known)
                raise ValueError(f"{{{name}}} is not known here; use {names}")
        return text

    return AfterValidator(check)


Rules = dict[str, dict[str, Action]]
Thresholds = dict[str, Annotated[float, Field(strict=True, gt=0, lt=1)]]
Hints = dict[str, Annotated[str, _template("type", "level")]]
Refusal = Annotated[str, _template("type", "level", "reason")]
RefusalError = Annotated[str, _template("reason")]
Tag = Annotated[str, StringConstraints(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")]
_STRICT = ConfigDict(extra="forbid")


class Language(TypedDict, total=False):
    """Texts in one language; what is missing falls back to the policy's own texts."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]

    hints: Annotated[Hints, Field(description="For each level, what the model is told.")]
    refusal: Annotated[Refusal, Field(description="The reply of the action refuse.")]
    refusal_error: Annotated[RefusalError, Field(description="The reply to a failed verdict.")]
    words: Annotated[
        dict[str, str], Field(description="Risk types and levels, as {type} and {level} say them.")
    ]


class Overrides(TypedDict, total=False):
    """What a tenant may change; the rest stays as it is."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]

    rules: Annotated[
        Rules, Field(description='For a risk type or "*", the action at each risk level.')
    ]
    off: Annotated[
        tuple[str, ...], Field(description="Risk types that are not acted on; a whole new list.")
    ]
    thresholds: Annotated[
        Thresholds, Field(description="For a risk type, the probability from which it is found.")
    ]
    hints: Annotated[Hints, Field(description="For each level, what the model is told.")]
    refusal: Annotated[Refusal, Field(description="The reply of the action refuse.")]
    refusal_error: Annotated[RefusalError, Field(description="The reply to a failed verdict.")]
    languages: Annotated[
        dict[Tag, Language], Field(description="Texts for a language, as in de or pt-BR.")
    ]


class File(Overrides, total=False):
    """A policy of psa-vlm."""

    name: Required[Annotated[str, Field(description="What records and errors call it.")]]
    inherits: Annotated[
        str, Field(description="A shipped policy, or a file beside this one, to change.")
    ]
    tenants: Annotated[
        dict[str, Overrides], Field(description="For each tenant, what is different.")
    ]


FILE = TypeAdapter(File)


def keys_at(loc: tuple[int | str, ...]) -> tuple[str, ...]:
    """The known keys of the mapping that holds the key at `loc`."""
    if len(loc) == 1:
        return ("name", "inherits", *Overrides.__annotations__, "tenants")
    inner = Language if loc[-3] == "languages" else Overrides
    return tuple(inner.__annotations__)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a policy file."""
    whole = [{"required": ["inherits"]}, {"required": list(NEEDED)}]
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, **FILE.json_schema(), "anyOf": whole}


def merged(base: Any, change: Any) -> Any:
    """`base` with `change` over it: mappings are joined key by key, anything else is replaced."""
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    both = {key: merged(base[key], change[key]) for key in base.keys() & change.keys()}
    return {**base, **change, **both}
