from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_vlm.errors import ConfigError, DataError, TaxonomyMismatch
from psa_vlm.taxonomy import Taxonomy

NAME = st.text("nofé1_-", min_size=1, max_size=4).filter(lambda name: name[0] != "-")
NAMES = st.lists(NAME, min_size=2, max_size=6, unique=True).map(tuple)


@st.composite
def taxonomies(draw: st.DrawFn) -> Taxonomy:
    types = draw(NAMES)
    return Taxonomy(types=types, levels=draw(NAMES), clean=draw(st.sampled_from(types)))


def test_the_default_is_the_papers() -> None:
    taxonomy = Taxonomy.default()
    assert taxonomy.types == (
        "politics",
        "illegal_risk",
        "insults_and_bullying",
        "fairness",
        "privacy",
        "misleading",
        "clean",
    )
    assert taxonomy.levels == ("safe", "low", "medium", "high")
    assert taxonomy.clean == "clean"
    assert taxonomy.safe_level == "safe"
    assert taxonomy.risk_types == taxonomy.types[:6]


def test_the_default_hash_is_the_one_in_checkpoints_already_saved() -> None:
    assert Taxonomy.default().hash == "05dcc11d12fbdc91"


@given(taxonomies())
def test_dict_and_yaml_round_trips_keep_content_and_hash(
    tmp_path_factory: pytest.TempPathFactory, taxonomy: Taxonomy
) -> None:
    path = tmp_path_factory.mktemp("taxonomy") / "taxonomy.yaml"
    taxonomy.to_yaml(path)
    for copy in (Taxonomy.from_yaml(path), Taxonomy.from_dict(taxonomy.to_dict())):
        assert copy == taxonomy
        assert copy.hash == taxonomy.hash


@given(taxonomies(), taxonomies())
def test_hashes_differ_exactly_where_contents_do(one: Taxonomy, other: Taxonomy) -> None:
    assert (one.hash == other.hash) == (one == other)


def test_the_order_of_names_is_content() -> None:
    default = Taxonomy.default()
    turned = Taxonomy(default.types[::-1], default.levels, default.clean)
    assert turned.hash != default.hash


@given(taxonomies())
def test_names_and_ids_agree(taxonomy: Taxonomy) -> None:
    for position, name in enumerate(taxonomy.types):
        assert taxonomy.type_id(name) == taxonomy.type_id(position) == position
    for position, name in enumerate(taxonomy.levels):
        assert taxonomy.level_id(name) == taxonomy.level_id(position) == position
    assert taxonomy.clean not in taxonomy.risk_types
    assert len(taxonomy.risk_types) == len(taxonomy.types) - 1


@pytest.mark.parametrize("value", ["violence", 7, -1, True, 1.0, None, ""])
def test_an_unknown_type_is_an_error_that_lists_the_valid_ones(value: object) -> None:
    with pytest.raises(DataError, match=r"type .* is not in the taxonomy; valid: 0 politics, 1 il"):
        Taxonomy.default().type_id(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["extreme", 4, -1, False])
def test_an_unknown_level_is_an_error_that_lists_the_valid_ones(value: object) -> None:
    with pytest.raises(DataError, match=r"level .* valid: 0 safe, 1 low, 2 medium, 3 high$"):
        Taxonomy.default().level_id(value)  # type: ignore[arg-type]


def test_labels_are_words_for_people() -> None:
    assert Taxonomy.default().label("insults_and_bullying") == "insults and bullying"
    assert Taxonomy.default().label(1) == "illegal risk"


def test_check_same_tells_taxonomies_apart() -> None:
    taxonomy = Taxonomy.default()
    taxonomy.check_same(taxonomy.hash, "runs/stage1")
    with pytest.raises(TaxonomyMismatch, match=r"runs/stage1: .*0123456789abcdef.*taxonomy file"):
        taxonomy.check_same("0123456789abcdef", "runs/stage1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("types: [a, b]\nlevels: [x, y]\n", "needs exactly the keys types, levels, clean"),
        ("types: [a, b]\nlevels: [x, y]\nclean: b\nextra: 1\n", "needs exactly the keys"),
        ("types: [a, b]\nlevels: [x, y]\nclean: c\n", "clean is 'c', but must be one of a, b"),
        ("types: [a, a]\nlevels: [x, y]\nclean: a\n", "types names one twice"),
        ("types: [a]\nlevels: [x, y]\nclean: a\n", "types must be a list of two names or more"),
        ("types: ab\nlevels: [x, y]\nclean: a\n", "types must be a list of two names or more"),
        ("types: [a, b]\nlevels: [off, on]\nclean: b\n", "False in levels is not a name"),
        ("types: [a.b, '*']\nlevels: [x, y]\nclean: b\n", "'a.b' in types is not a name"),
        ("types: [a, b\n", "not valid YAML"),
        ("types: [a, b]\ntypes: [a, c]\n", "the key 'types' is given twice"),
        ("", "needs exactly the keys"),
    ],
)
def test_a_malformed_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Taxonomy.from_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file"):
        Taxonomy.from_yaml(tmp_path / "none.yaml")
