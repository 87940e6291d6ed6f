"""Blind human A/B: two anonymous answers to a request, and people who say which is better.

The paper's tool. Nobody who rates learns which model an answer is of: sides are drawn for each
rater and request, and names are in no page. What was said lies in one SQLite file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal, get_args
from urllib.parse import parse_qs, quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from psa_vlm.errors import DataError, MissingExtra
from psa_vlm.evaluation.agreement import krippendorff_alpha
from psa_vlm.evaluation.compare import thumbnail
from psa_vlm.evaluation.outcomes import in_text
from psa_vlm.evaluation.scorers import wilson

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog
    from starlette.applications import Starlette

Choice = Literal["a", "tie", "b"]
"""Which of the two models answered better."""

LONGEST_NAME = 40
LONGEST_BODY = 4096
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Pair:
    """A request with the answers of both models."""

    item: str
    question: str
    images: list[str]
    a: str
    b: str


def pairs(first: EvalLog, second: EvalLog, limit: int | None = None, seed: int = 0) -> list[Pair]:
    """The requests that both logs answered, in words that differ.

    Args:
        first, second: logs of one task.
        limit: most pairs, drawn by the seed.
        seed: of the draw.

    Raises:
        DataError: there are none.
    """
    answered = [
        {str(one.id): one for one in log.samples or [] if one.epoch == 1 and one.error is None}
        for log in (first, second)
    ]
    found = []
    for item, sample in answered[0].items():
        if item in answered[1]:
            question, images, a = in_text(sample)
            b = in_text(answered[1][item])[2]
            if a.strip() != b.strip():
                found.append(Pair(item, question, images, a, b))
    if not found:
        raise DataError("these evaluations share no request that they answer differently")
    if limit is not None and len(found) > limit:
        found = Random(seed).sample(found, limit)
    return found


def swapped(rater: str, item: str, seed: int) -> bool:
    """Whether this rater sees the second model's answer on the left."""
    return Random(f"{seed}/{rater}/{item}").random() < 0.5


class Rated(BaseModel):
    """How often a rater, or all of them, found which model better."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rater: str
    a: int
    tie: int
    b: int


class Summary(BaseModel):
    """What people said: by rater and in all; how often `a` won where one did; how far they agree.

    `alpha` is Krippendorff's over requests that several rated; null where it has none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, str]
    raters: list[Rated]
    total: Rated
    wins_of_a: float | None
    low: float | None
    high: float | None
    alpha: float | None
    shared: int

    def table(self) -> Group:
        """For the terminal: a line for each rater and one for all."""
        table = Table("rater", "A wins", "tie", "A loses", box=box.SIMPLE_HEAD)
        for one in [*self.raters, self.total]:
            table.add_row(one.rater, str(one.a), str(one.tie), str(one.b))
        lines = [f"{letter.upper()}: {name}" for letter, name in self.models.items()]
        if self.wins_of_a is not None and self.low is not None and self.high is not None:
            lines.append(
                f"A wins {100 * self.wins_of_a:.1f}% ({100 * self.low:.1f}-{100 * self.high:.1f}) "
                f"of {self.total.a + self.total.b} that were no tie (Wilson, judge: people)"
            )
        alpha = "not defined" if self.alpha is None else f"{self.alpha:.2f}"
        lines.append(f"agreement over {self.shared} requests: Krippendorff's alpha {alpha}")
        return Group(table, Text("\n".join(lines)))


class Ratings:
    """The SQLite file of what people said.

    Args:
        path: the file; made if there is none.
        models: names of both; None takes those that the file holds.

    Raises:
        DataError: the file is of other models, holds no ratings, or is no such file.
    """

    def __init__(self, path: Path, models: tuple[str, str] | None = None) -> None:
        self.path = path
        if models is None and not path.is_file():
            raise DataError(f"{path}: no such file of ratings")
        try:
            with closing(self._open()) as store, store:
                store.execute("CREATE TABLE IF NOT EXISTS models (a TEXT, b TEXT)")
                store.execute(
                    "CREATE TABLE IF NOT EXISTS ratings (rater TEXT, item TEXT, choice TEXT,"
                    " at TEXT DEFAULT CURRENT_TIMESTAMP, PRIMARY KEY (rater, item))"
                )
                held = store.execute("SELECT a, b FROM models").fetchone()
                if held is None and models is not None:
                    store.execute("INSERT INTO models VALUES (?, ?)", models)
        except sqlite3.Error as error:
            raise DataError(f"{path}: not a file of ratings ({error})") from error
        if held is None and models is None:
            raise DataError(f"{path}: holds no ratings")
        if held is not None and models is not None and tuple(held) != models:
            raise DataError(f"{path}: holds ratings of {held[0]} and {held[1]}; name another file")
        self.models: tuple[str, str] = models or (held[0], held[1])

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=10)

    def add(self, rater: str, item: str, choice: Choice) -> None:
        """Keep what a rater said; a second word on the same request replaces the first."""
        with closing(self._open()) as store, store:
            store.execute(
                "INSERT INTO ratings (rater, item, choice) VALUES (?, ?, ?)"
                " ON CONFLICT (rater, item) DO UPDATE SET choice = excluded.choice,"
                " at = CURRENT_TIMESTAMP",
                (rater, item, choice),
            )

    def of(self, rater: str) -> set[str]:
        """The requests that a rater is done with."""
        with closing(self._open()) as store:
            rows = store.execute("SELECT item FROM ratings WHERE rater = ?", (rater,))
            return {item for (item,) in rows}

    def summary(self) -> Summary:
        """What was said so far."""
        with closing(self._open()) as store:
            rows = store.execute(
                "SELECT rater, item, choice FROM ratings ORDER BY rater, item"
            ).fetchall()
        raters = list(dict.fromkeys(rater for rater, _, _ in rows))
        items: dict[str, list[str]] = {}
        for _, item, choice in rows:
            items.setdefault(item, []).append(choice)
        interval = wilson([choice == "a" for _, _, choice in rows if choice != "tie"])
        return Summary(
            models=dict(zip(("a", "b"), self.models, strict=True)),
            raters=[_count(name, [c for rater, _, c in rows if rater == name]) for name in raters],
            total=_count("all", [choice for _, _, choice in rows]),
            wins_of_a=None if interval is None else interval.value,
            low=None if interval is None else interval.low,
            high=None if interval is None else interval.high,
            alpha=krippendorff_alpha(list(items.values())),
            shared=sum(len(choices) > 1 for choices in items.values()),
        )


def _count(rater: str, choices: Sequence[str]) -> Rated:
    return Rated(rater=rater, **{one: choices.count(one) for one in get_args(Choice)})


def app(shown: Sequence[Pair], ratings: Ratings, seed: int = 0) -> Starlette:
    """The page, as an ASGI application; it needs no script in the browser.

    Args:
        shown: what is to be rated; each rater gets them in an order of their own.
        ratings: where it is kept.
        seed: of the order and of the sides.

    Raises:
        MissingExtra: starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import HTMLResponse, RedirectResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise MissingExtra("starlette", "serve") from error

    page = Environment(
        loader=PackageLoader("psa_vlm.evaluation", ""), autoescape=True, undefined=StrictUndefined
    ).get_template("ab.html")
    known = {pair.item: pair for pair in shown}

    def show(status: int = 200, **values: object) -> Response:
        told = {"rater": "", "pair": None, "problem": "", "done": 0, "count": len(known)} | values
        return HTMLResponse(page.render(told), status, HEADERS)

    def start(_: Request) -> Response:
        return show()

    def rate(request: Request) -> Response:
        rater = request.query_params.get("rater", "").strip()
        if not rater or len(rater) > LONGEST_NAME:
            return show(400, problem=f"Give a name of 1 to {LONGEST_NAME} characters.")
        order = sorted(known)
        Random(f"{seed}/{rater}").shuffle(order)
        done = ratings.of(rater) & known.keys()
        rest = [item for item in order if item not in done]
        if not rest:
            return show(rater=rater, done=len(done))
        pair = known[rest[0]]
        sides = (pair.b, pair.a) if swapped(rater, pair.item, seed) else (pair.a, pair.b)
        images = [small for image in pair.images if (small := thumbnail(image, 640))]
        return show(rater=rater, pair=pair, sides=sides, images=images, done=len(done))

    async def said(request: Request) -> Response:
        body = await request.body()
        if len(body) > LONGEST_BODY:
            return show(413, problem="That is too long.")
        form = parse_qs(body.decode("utf-8", "replace"))
        rater, item, side = (form.get(key, [""])[-1].strip() for key in ("rater", "item", "better"))
        fits = rater and len(rater) <= LONGEST_NAME and item in known
        if not fits or side not in ("left", "tie", "right"):
            return show(400, problem="That is no rating; begin again.")
        choice: Choice = "tie"
        if side != "tie":
            choice = "a" if (side == "left") != swapped(rater, item, seed) else "b"
        ratings.add(rater, item, choice)
        return RedirectResponse(f"/rate?rater={quote(rater, safe='')}", 303, HEADERS)

    return Starlette(
        routes=[Route("/", start), Route("/rate", rate), Route("/rate", said, methods=["POST"])]
    )
