"""Which policy holds, and what becomes of one that changes while the service runs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter

from psa_vlm.errors import PolicyError
from psa_vlm.policy.policy import Policy
from psa_vlm.serving.policies import Policies
from psa_vlm.taxonomy import Taxonomy

HOUSE = "name: house\ninherits: parent.yaml\ntenants: {school: {off: [privacy]}}\n"
PARENT = "name: parent\ninherits: strict\n"


@pytest.fixture()
def house(tmp_path: Path) -> Path:
    (tmp_path / "parent.yaml").write_text(PARENT)
    path = tmp_path / "house.yaml"
    path.write_text(HOUSE)
    return path


@pytest.fixture()
def reloads() -> Counter:
    return Counter("psa_policy_reloads", "", ["outcome"], registry=CollectorRegistry())


@pytest.fixture()
def policies(house: Path, reloads: Counter) -> Policies:
    return load(house, reloads, ["school"])


def load(path: Path, reloads: Counter, tenants: list[str] | None) -> Policies:
    def read() -> Policy:
        return Policy.from_yaml(path)

    return Policies(read(), Taxonomy.default(), tenants, read, reloads)


def counted(reloads: Counter) -> dict[str, float]:
    return {
        one.labels["outcome"]: one.value
        for one in next(iter(reloads.collect())).samples
        if one.name.endswith("_total")
    }


def test_a_tenant_has_its_part_and_everybody_the_whole(house: Path, reloads: Counter) -> None:
    assert load(house, reloads, ["school"]).of("school").off == ("privacy",)
    assert load(house, reloads, None).of(None).name == "house"
    with pytest.raises(PolicyError, match="no tenant 'shop'"):
        load(house, reloads, ["shop"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: house\n", "is missing"),
        (HOUSE.replace("privacy", "weapons"), "not a risk type"),
        (HOUSE.replace("school", "shop"), "no tenant 'school'"),
        ("{", "not valid YAML"),
        (None, "can not read"),
    ],
)
def test_a_bad_policy_is_refused_and_the_old_one_stays(
    house: Path,
    policies: Policies,
    reloads: Counter,
    caplog: pytest.LogCaptureFixture,
    text: str | None,
    told: str,
) -> None:
    before = policies.of("school")
    house.unlink() if text is None else house.write_text(text)
    policies.reload()
    assert policies.of("school") is before
    assert told in caplog.text and "old one stays" in caplog.text
    assert counted(reloads) == {"refused": 1}
    house.write_text(HOUSE.replace("privacy", "politics"))
    policies.reload()
    assert policies.of("school").off == ("politics",)
    assert counted(reloads) == {"refused": 1, "ok": 1}


def changes(house: Path) -> list[Callable[[], None]]:
    def replaced() -> None:  # as editors and deployments do
        new = house.with_suffix(".new")
        new.write_text(HOUSE.replace("privacy", "politics"))
        os.replace(new, house)

    return [
        lambda: house.with_name("parent.yaml").write_text(PARENT + "off: [fairness]\n") and None,
        lambda: house.write_text("{") and None,
        replaced,
    ]


def test_a_change_of_any_file_is_seen_once(
    house: Path, policies: Policies, reloads: Counter
) -> None:
    async def watched() -> list[dict[str, float]]:
        watch, seen = asyncio.create_task(policies.watch(0.01)), [{}]
        await asyncio.sleep(0.05)
        assert counted(reloads) == {}
        for change in changes(house):
            change()
            for _ in range(500):
                await asyncio.sleep(0.01)
                if counted(reloads) != seen[-1]:
                    break
            await asyncio.sleep(0.05)
            seen.append(counted(reloads))
        watch.cancel()
        return seen[1:]

    first, second, third = asyncio.run(watched())
    assert (first, second, third) == ({"ok": 1}, {"ok": 1, "refused": 1}, {"ok": 2, "refused": 1})
    assert policies.of("school").off == ("politics",)


def test_a_policy_without_a_source_stays(reloads: Counter) -> None:
    policies = Policies(Policy.default(), Taxonomy.default(), None, None, reloads)
    policies.reload()
    assert counted(reloads) == {}
