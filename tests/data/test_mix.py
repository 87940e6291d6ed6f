from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from psa_vlm.data.mix import Most, balanced

CLEAN = 6
mixes = st.lists(st.integers(-1, CLEAN), max_size=120)
mosts = st.one_of(
    st.sampled_from(["all", "equal"]), st.dictionaries(st.integers(0, 5), st.integers(0, 20))
)


def counts(types: np.ndarray, keep: np.ndarray) -> dict[int, int]:
    kept = types[keep].tolist()
    return {one: kept.count(one) for one in set(types.tolist())}


def draw(types: list[int], most: Most, ratio: float | None, seed: int = 0) -> dict[int, int]:
    array = np.array(types, np.int64)
    return counts(array, balanced(array, CLEAN, most, ratio, np.random.default_rng(seed)))


@given(mixes, mosts, st.none() | st.floats(0, 5))
def test_the_ratio_and_the_limits_hold(types: list[int], most: Most, ratio: float | None) -> None:
    kept = draw(types, most, ratio)
    risky = {one: n for one, n in kept.items() if one not in (-1, CLEAN)}
    total, clean = sum(risky.values()), kept.get(CLEAN, 0)
    assert kept.get(-1, 0) == types.count(-1)
    if isinstance(most, dict):
        assert all(n <= most.get(one, n) for one, n in risky.items())
    if most == "equal" and risky:
        assert max(risky.values()) - min(risky.values()) <= 1
    if ratio is None:
        assert clean == types.count(CLEAN)
    elif total:
        assert abs(clean - ratio * total) <= max(0.5, ratio)


def test_nothing_is_wasted() -> None:
    types = [0] * 10 + [1] * 4 + [CLEAN] * 100 + [-1] * 3
    assert draw(types, "all", 0.5) == {0: 10, 1: 4, CLEAN: 7, -1: 3}
    assert draw(types, "equal", 2) == {0: 4, 1: 4, CLEAN: 16, -1: 3}
    assert draw(types, {0: 6}, 0) == {0: 6, 1: 4, CLEAN: 0, -1: 3}


def test_too_few_clean_samples_cost_every_type_alike() -> None:
    assert draw([0] * 60 + [1] * 30 + [CLEAN] * 6, "all", 0.2) == {0: 20, 1: 10, CLEAN: 6}


def test_the_seed_draws() -> None:
    types = np.array([0] * 50 + [CLEAN] * 50)
    one, again, other = (
        balanced(types, CLEAN, "all", 0.5, np.random.default_rng(seed)).tolist()
        for seed in (0, 0, 1)
    )
    assert one == again != other
