from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from psa_vlm.data.config import PrepareConfig
from psa_vlm.data.prepare import prepare
from psa_vlm.data.readers import read
from psa_vlm.data.sample import Sample
from psa_vlm.errors import ConfigError, DataError, ImageError
from psa_vlm.taxonomy import Taxonomy

WORDS = Taxonomy.default()
Row = tuple[int, int, str]
"""Type by label id, number of the picture, question."""


def picture(seed: int) -> Image.Image:
    grid = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(grid).resize((32, 32), Image.Resampling.BICUBIC)


def write(folder: Path, name: str, rows: list[Row], suffix: str = ".png") -> Path:
    """A set in the authors' layout; its pictures are its own files."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for type, seed, question in rows:
        image = f"{name}-{seed}{suffix}"
        if not (folder / image).exists():
            picture(seed).save(folder / image)
        lines.append(
            {
                "safe_type": type,
                "safe_level": 0 if type == 6 else 2,
                "image": image,
                "conversations": [
                    {"from": "USER", "value": f"<image>\n{question}"},
                    {"from": "ASSISTANT", "value": "Yes."},
                ],
            }
        )
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def config(*paths: Path, **changes: Any) -> PrepareConfig:
    sources = [{"path": path} for path in paths]
    return PrepareConfig.model_validate({"sources": sources} | changes)


def splits(out: Path) -> dict[str, list[Sample]]:
    return {
        path.name: read(path) for path in sorted(out.iterdir()) if (path / "state.json").exists()
    }


def dropped(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]


def seen(samples: list[Sample]) -> set[bytes]:
    return {Image.open(path).tobytes() for one in samples for path in one.images}  # type: ignore[arg-type]


ROWS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 25), st.sampled_from(["Who?", "What?"])),
    max_size=30,
)


@settings(max_examples=10)
@given(ROWS, ROWS, st.floats(0, 2), st.integers(0, 9))
def test_a_mix_is_whole_leak_free_and_balanced(
    one: list[Row], two: list[Row], ratio: float, seed: int
) -> None:
    if not one or not two:
        return
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "out"
        paths = write(folder, "one", one), write(folder, "two", two, ".bmp")
        shares = {"train": 0.6, "test": 0.4}
        balance = {"clean_to_risky": ratio}
        manifest = prepare(config(*paths, splits=shares, balance=balance, seed=seed), out)
        parts = splits(out)
        kept = [one for part in parts.values() for one in part]

        assert len(kept) + len(dropped(out)) == len(one) + len(two)
        sides = [seen(part) for part in parts.values()]
        assert sum(map(len, sides)) == len(set().union(*sides))
        asked = {(one.question, *seen([one])) for one in kept}
        assert len(asked) == len(kept)
        train = parts.get("train", [])
        clean = sum(one.type == "clean" for one in train)
        if risky := len(train) - clean:
            assert abs(clean - ratio * risky) <= max(0.5, ratio)
        for split, part in parts.items():
            assert manifest["splits"][split]["samples"] == len(part)
            assert all(one.split == split for one in part)


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    path = write(tmp_path, "set", [(4, 0, "What does it say?"), (6, 1, "What is it?")])
    prepare(config(path, splits={"train": 1.0}), tmp_path / "out")
    assert [
        (one.id, one.conversation, one.type, one.level, one.source)
        for one in read(tmp_path / "out" / "train")
    ] == [(one.id, one.conversation, one.type, one.level, one.source) for one in read(path)]


def test_the_same_again_is_the_same_and_a_seed_is_another(tmp_path: Path) -> None:
    path = write(tmp_path, "set", [(i % 7, i, "What?") for i in range(30)])
    hashes = [
        {name: one["hash"] for name, one in prepare(config(path, seed=seed), out)["splits"].items()}
        for seed, out in ((0, tmp_path / "a"), (0, tmp_path / "b"), (1, tmp_path / "c"))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_copies_are_named_with_their_original(tmp_path: Path) -> None:
    path = write(tmp_path, "set", [(4, 0, "Who?"), (4, 1, "Who?"), (4, 0, "who"), (3, 0, "Who?")])
    out = tmp_path / "out"
    manifest = prepare(config(path, splits={"train": 1.0}), out)
    assert [(one["where"], one["reason"]) for one in dropped(out)] == [
        (f"{path}:3", f"copy of {path}:1"),
        (f"{path}:4", f"copy of {path}:1, with another label"),
    ]
    assert manifest["left_out"] == {"copy": 1, "copy, with another label": 1}


@pytest.mark.parametrize(("near", "count"), [(4, 1), (None, 2)])
def test_near_copies_count_as_copies_if_wanted(
    tmp_path: Path, near: int | None, count: int
) -> None:
    one = write(tmp_path, "one", [(4, 0, "Who?")])
    two = write(tmp_path, "two", [(4, 0, "Who?")])
    picture(0).resize((40, 40)).save(tmp_path / "two-0.png")
    manifest = prepare(config(one, two, near=near, splits={"train": 1.0}), tmp_path / "out")
    assert manifest["splits"]["train"]["samples"] == count


def test_what_is_tested_is_taken_out_of_training(tmp_path: Path) -> None:
    train = write(tmp_path, "train", [(4, 0, "Who?"), (4, 1, "Who?"), (4, 2, "Who?")])
    test = write(tmp_path, "test", [(4, 0, "Who?"), (4, 1, "Other?")])
    sources = [{"path": train, "split": "train"}, {"path": test, "split": "test"}]
    out = tmp_path / "out"
    prepare(PrepareConfig.model_validate({"sources": sources}), out)
    parts = splits(out)
    assert [one.id for one in parts["train"]] == ["train-2"]
    assert [one.id for one in parts["test"]] == ["test-0", "test-1"]
    assert [one["reason"] for one in dropped(out)] == [
        f"copy of {test}:1",
        "shares an image with test",
    ]


def test_types_and_takes_limit_a_mix(tmp_path: Path) -> None:
    one = write(tmp_path, "one", [(4, i, "Who?") for i in range(8)])
    two = write(tmp_path, "two", [(i % 2, 10 + i, "Who?") for i in range(12)])
    sources = [{"path": one, "take": 5}, {"path": two}]
    asked = {"sources": sources, "splits": {"train": 1.0}}
    manifest = prepare(PrepareConfig.model_validate(asked), tmp_path / "a")
    assert manifest["splits"]["train"]["type"] == {
        "privacy": 5,
        "politics": 6,
        "illegal_risk": 6,
    }
    asked["balance"] = {"types": {"politics": 2}}
    types = prepare(PrepareConfig.model_validate(asked), tmp_path / "b")["splits"]["train"]["type"]
    assert types["politics"] == 2 and types["illegal_risk"] == 6
    asked["balance"] = {"types": "equal"}
    types = prepare(PrepareConfig.model_validate(asked), tmp_path / "c")["splits"]["train"]["type"]
    assert set(types.values()) == {5}


def test_an_image_inside_a_file_is_written_out(tmp_path: Path) -> None:
    import base64

    picture(3).save(tmp_path / "a.png")
    image = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    path = tmp_path / "MME.tsv"
    path.write_text(f"image\tquestion\tanswer\tcategory\n{image}\tTwo?\tYes\tcount\n")
    prepare(config(path, splits={"train": 1.0}), tmp_path / "out")
    [sample] = read(tmp_path / "out" / "train")
    assert seen([sample]) == {picture(3).tobytes()}
    assert sample.tags == {"category": "count"}


def break_image(folder: Path) -> None:
    (folder / "set-1.png").write_bytes(b"no image")


def lose_image(folder: Path) -> None:
    (folder / "set-1.png").unlink()


@pytest.mark.parametrize("harm", [break_image, lose_image])
def test_a_bad_row_stops_or_is_written_down(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    path = write(tmp_path, "set", [(4, 0, "Who?"), (4, 1, "Who?")])
    harm(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(ImageError, match=r"set\.jsonl:2: .*set-1\.png"):
        prepare(config(path), out)
    assert {one.name for one in tmp_path.iterdir()} <= {"set.jsonl", "set-0.png", "set-1.png"}
    manifest = prepare(config(path, on_problem="drop", splits={"train": 1.0}), out)
    assert manifest["sources"][0]["problems"] == 1
    [line] = dropped(out)
    assert f"{path}:2: " in line["reason"] and "set-1.png" in line["reason"]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    path = write(tmp_path, "set", [(4, 0, "Who?")])
    with pytest.raises(ConfigError, match="exists already; choose another folder"):
        prepare(config(path), tmp_path)


def test_no_usable_row_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "set", [(4, 1, "Who?")])
    lose_image(tmp_path)
    with pytest.raises(DataError, match="hold no row that can be used"):
        prepare(config(path, on_problem="drop"), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"balance": {"splits": ["dev"]}}, "split 'dev' is not in splits; known: train, val, test"),
        ({"splits": {"a/b": 1.0}}, "'a/b' is not a name for a split"),
        ({"splits": {"train": 0.5}}, "must be 0 or more and sum to 1"),
        ({"balance": {"types": {"weather": 3}}}, "type 'weather' is not in the taxonomy"),
    ],
)
def test_a_wrong_configuration_is_an_error(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, "set", [(4, 0, "Who?")])
    splits_ = {"splits": {"train": 1.0, "val": 0.0, "test": 0.0}} if "balance" in changes else {}
    with pytest.raises((ValueError, DataError), match=message):
        prepare(config(path, **splits_ | changes), tmp_path / "out")
