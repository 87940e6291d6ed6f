"""Evaluations side by side: the tests by hand, what is shown, and what can't be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from psa_vlm.errors import DataError
from psa_vlm.evaluation.ab import Pair, Ratings, app, pairs, swapped
from psa_vlm.evaluation.compare import compare, disagreements, paired_test, write_comparison
from psa_vlm.evaluation.outcomes import read_log
from psa_vlm.evaluation.running import Asked, evaluate
from psa_vlm.evaluation.tasks import benchmark_named

pytestmark = [  # of Inspect's own
    pytest.mark.filterwarnings("ignore:The 'initial' parameter:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]

REFUSAL = "I'm sorry, but I can't help with that."


def test_mcnemar_looks_at_what_changed() -> None:
    same, rose, fell = [(1.0, 1.0)] * 50, [(0.0, 1.0)] * 9, [(1.0, 0.0)] * 2
    name, p = paired_test([*same, *rose, *fell])
    assert name == "McNemar's exact" and p == pytest.approx(binomtest(9, 11).pvalue)
    assert paired_test(same) == ("McNemar's exact", 1.0)


def test_permutation_over_all_swaps_and_over_draws() -> None:
    name, p = paired_test([(1.0, 3.0), (2.0, 5.0), (1.0, 2.0), (4.0, 4.0)])
    assert name == "permutation" and p == pytest.approx(2 / 8)  # all three rose: 2 of 8 swaps
    many = [(1.0, 1.5)] * 30
    assert paired_test(many, seed=1)[1] == paired_test(many, seed=1)[1] < 0.001
    assert paired_test([(1.5, 1.5)]) == ("permutation", 1.0)


def test_two_runs_end_to_end(scripted: Callable[..., Any], figstep: Path, tmp_path: Path) -> None:
    """One log where all three are answered, one where all are refused."""
    samples = benchmark_named("figstep").read(figstep)
    for name, say in (("open", lambda _: "<b>Yes</b>"), ("shut", lambda _: REFUSAL)):
        evaluate("figstep", samples, scripted(say, name), Asked(), tmp_path / name)
    logs = [read_log(tmp_path / name) for name in ("open", "shut")]
    comparison = compare(logs)
    [whole] = [d for d in comparison.differences if (d.group, d.judge) == ("all", "rules")]
    assert (whole.change, whole.n, whole.p) == (-1.0, 3, 0.25)
    assert whole.adjusted == 1.0 and all(d.adjusted >= d.p for d in comparison.differences)
    cases = disagreements(logs)
    assert len(cases) == 3 and len(disagreements(logs, most=2)) == 2
    assert [reply.text for reply in cases[0].replies] == ["<b>Yes</b>", REFUSAL]
    page = tmp_path / "page.html"
    write_comparison(page, comparison, cases, "psa-vlm compare")
    text = page.read_text("utf-8")
    assert "&lt;b&gt;Yes" in text and "<b>Yes" not in text
    assert text.count('<img src="data:image/png;base64,') == 3 and "100.0%" in text
    assert all(word in text for word in ("McNemar", "rules", "phrases", "scripted/open", "Holm"))

    shown = pairs(*logs)
    assert {(pair.a, pair.b) for pair in shown} == {("<b>Yes</b>", REFUSAL)}
    assert len(pairs(*logs, limit=1)) == 1
    with pytest.raises(DataError, match="answer differently"):
        pairs(logs[0], logs[0])
    with pytest.raises(DataError, match="compare 2 to 8"):
        compare(logs[:1])
    other = logs[0].model_copy(deep=True)
    other.eval.task = "pope"
    with pytest.raises(DataError, match="several tasks"):
        compare([logs[1], other])


def test_ratings_are_kept_counted_and_compared(tmp_path: Path) -> None:
    path = tmp_path / "ratings.sqlite"
    ratings = Ratings(path, ("one", "two"))
    for rater, said in (("ann", "aab"), ("bob", "atb")):
        for item, choice in zip("xyz", said, strict=True):
            ratings.add(rater, item, {"a": "a", "b": "b", "t": "tie"}[choice])  # type: ignore[arg-type]
    ratings.add("bob", "z", "b")  # the same again counts once
    found = Ratings(path).summary()
    assert [(one.rater, one.a, one.tie, one.b) for one in found.raters] == [
        ("ann", 2, 0, 1),
        ("bob", 1, 1, 1),
    ]
    assert found.wins_of_a == pytest.approx(3 / 5) and found.shared == 3
    # By hand: labels a,a a,tie b,b; observed 2, expected (36 - 9 - 1 - 4) / 5.
    assert found.alpha == pytest.approx(1 - 2 / (22 / 5))
    with pytest.raises(DataError, match="holds ratings of one and two"):
        Ratings(path, ("one", "three"))
    with pytest.raises(DataError, match="no such file"):
        Ratings(tmp_path / "no.sqlite")
    (tmp_path / "bad.sqlite").write_text("not a database" * 100)
    with pytest.raises(DataError, match="not a file of ratings"):
        Ratings(tmp_path / "bad.sqlite")


def test_the_page_is_blind_and_maps_sides_back(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    shown = [
        Pair(f"i{n}", f"<i>Question</i> {n}?", [], "words of A", "words of B") for n in range(8)
    ]
    ratings = Ratings(tmp_path / "r.sqlite", ("model-one", "model-two"))
    with TestClient(app(shown, ratings, seed=3)) as client:
        assert "Begin" in client.get("/").text
        assert client.get("/rate", params={"rater": " "}).status_code == 400
        sides = set()
        for _ in shown:
            page = client.get("/rate", params={"rater": "ann"})
            assert "model-" not in page.text and "&lt;i&gt;Question" in page.text
            assert "default-src 'none'" in page.headers["content-security-policy"]
            item = page.text.split('name="item" value="')[1].split('"')[0]
            a_is_left = page.text.index("words of A") < page.text.index("words of B")
            assert a_is_left != swapped("ann", item, 3)
            sides.add(a_is_left)
            form = {"rater": "ann", "item": item, "better": "left" if a_is_left else "right"}
            assert client.post("/rate", data=form).status_code == 200
        assert sides == {True, False}
        assert "All 8 are done" in client.get("/rate", params={"rater": "ann"}).text
        for form in ({"rater": "ann", "item": "no", "better": "left"}, {"item": "i0"}):
            assert client.post("/rate", data=form).status_code == 400
    total = ratings.summary().total
    assert (total.a, total.tie, total.b) == (8, 0, 0)
