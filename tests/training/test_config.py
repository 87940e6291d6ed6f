"""Configurations: every shipped one, and every way to get one wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from pydantic import BaseModel

from psa_vlm.errors import ConfigError
from psa_vlm.training import config as module
from psa_vlm.training.config import (
    ConceptsConfig,
    DataFile,
    LoraConfig,
    RunConfig,
    Section,
    Stage1Config,
    Stage2Config,
    TokensConfig,
    changes,
    load,
)

ROOT = Path(__file__).parents[2]
SHIPPED = [
    *(ROOT / "configs").glob("*.yaml"),
    *Path(str(files("psa_vlm.testbed") / "assets")).glob("stage*.yaml"),
]
STAGES = {"stage1": Stage1Config, "stage2": Stage2Config}


@pytest.fixture()
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text("backbone: base\nout: runs/a\nconcepts: {epochs: 2}\n")
    return file


def test_there_are_shipped_ones() -> None:
    assert {file.stem[-6:] for file in SHIPPED} == set(STAGES)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_every_shipped_one_loads(file: Path) -> None:
    loaded = load(file, STAGES[file.stem[-6:]])
    assert loaded.out.name == file.stem[-6:]


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_papers_numbers(size: str) -> None:
    first = load(ROOT / f"configs/llava-1.5-{size}-stage1.yaml", Stage1Config)
    second = load(ROOT / f"configs/llava-1.5-{size}-stage2.yaml", Stage2Config)
    for part in (first.concepts, first.tokens):
        assert (part.learning_rate, part.warmup_steps, part.epochs) == (1e-5, 20, 3)
    assert (first.concepts.tokens, first.tokens.count, first.concepts.weight) == (64, 64, 10)
    assert (first.concepts.hidden, first.concepts.heads, first.concepts.depth) == (1088, 8, 3)
    lora = second.lora
    assert (lora.r, lora.alpha, lora.dropout) == (256, 16, 0.05)
    assert (lora.learning_rate, lora.warmup_steps, lora.epochs) == (1e-5, 300, 3)
    assert (lora.batch_size, lora.accumulation) == (2, 8)


def sections() -> Iterator[type[BaseModel]]:
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Section):
            yield value


def test_every_field_has_its_words_and_is_read() -> None:
    folder = Path(module.__file__).parent
    source = "".join(file.read_text() for file in folder.glob("*.py"))
    for section in sections():
        text = Path(module.__file__).read_text()
        for name in section.model_fields:
            assert re.search(rf'[.(]{name}\b|"{name}"', source), f"{section.__name__}.{name}"
    for name, rest in re.findall(r"^    (\w+): [^\n]*=? ?[^\n]*\n(.*)", text, re.MULTILINE):
        if name not in ("encoder", "concepts", "tokens", "lora"):
            assert rest.strip().startswith('"""'), name


def test_overrides_come_last(path: Path) -> None:
    loaded = load(path, Stage1Config, ["concepts.epochs=3", "tokens.count=8", "out=runs/b"])
    assert loaded.concepts.epochs == 3
    assert loaded.tokens.count == 8
    assert loaded.out == Path("runs/b")


def test_zero_and_empty_are_values(path: Path) -> None:
    loaded = load(
        path,
        Stage1Config,
        [
            "concepts.epochs=0",
            "concepts.warmup_steps=0",
            "concepts.max_grad_norm=0",
            "concepts.learning_rate=0",
            "tokens.count=0",
            "seed=0",
            "report_to=[]",
        ],
    )
    concepts = loaded.concepts
    assert (concepts.epochs, concepts.warmup_steps, concepts.max_grad_norm) == (0, 0, 0)
    assert (concepts.learning_rate, loaded.tokens.count, loaded.report_to) == (0, 0, ())


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("bits=5", r"bits: .*4 or 8, got 5"),
        ("attention=quick", r"attention: .*'eager', 'sdpa' or 'flash_attention_2'"),
        ("concepts.epoch=3", r"unknown key 'concepts\.epoch'; known keys: epochs, learning_rate"),
        ("epochs=3", r"unknown key 'epochs'; known keys: out, data, seed, .*concepts, tokens"),
        ("data=[{file: a.json}]", r"the key 'data\.0\.path' is missing\n.*known keys: path, im"),
        ("concepts.epochs=-1", r"concepts\.epochs: .*greater than or equal to 0, got -1"),
        ("concepts.epochs=many", r"concepts\.epochs: .*integer.*, got 'many'"),
        ("concepts.learning_rate=.inf", r"concepts\.learning_rate: .*finite"),
        ("concepts.pooling=last", r"concepts\.pooling: .*'first', 'text' or 'none'"),
        ("concepts.projector=mlp", r"concepts\.projector: .*'abstractor' or 'linear'"),
        ("concepts.log_every=7", r"concepts\.checkpoint_every is 100; make it a multiple of"),
        ("out=base", r"out is base, which backbone reads"),
        ("seed.x=1", r"override 'seed\.x=1': seed is not a section"),
        ("seed", r"override 'seed': write it as key=value"),
        ("seed=[", r"override 'seed=\[': not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(path: Path, override: str, line: str) -> None:
    overrides = ["seed=1", override]
    with pytest.raises(ConfigError, match=line) as caught:
        load(path, Stage1Config, overrides)
    if not override.startswith("seed"):
        assert all(one.startswith(f"{path}: ") for one in str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[1]", "must hold the keys out, data"),
        ("out: [", "not valid YAML"),
        ("out: a\nout: b", "the key 'out' is given twice"),
        ("out: runs/a", "the key 'backbone' is missing"),
        ("", "must hold the keys"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(file)) + ".*" + line):
        load(file, Stage1Config)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load(tmp_path / "none.yaml", Stage1Config)


def test_out_may_not_be_what_is_read() -> None:
    with pytest.raises(ValueError, match=r"which data\.0\.path reads"):
        Stage2Config(model="m", out="a/../d.json", data=(DataFile(path="d.json"),))
    with pytest.raises(ValueError, match="which model reads"):
        Stage2Config(model="m", out="m")


def test_changes_are_named_by_key() -> None:
    old = Stage1Config(backbone="b", out="o").model_dump()
    new = Stage1Config(
        backbone="b", out="o", seed=1, concepts=ConceptsConfig(epochs=1), tokens=TokensConfig()
    ).model_dump()
    assert changes(old, old) == []
    assert changes(old, new) == ["seed", "concepts.epochs"]
    assert changes({"a": None}, {"b": None}) == ["a", "b"]


def test_schedules_are_found_by_name() -> None:
    assert set(Stage1Config(backbone="b", out="o").schedules) == {"concepts", "tokens"}
    assert Stage2Config(model="m", out="o", lora=LoraConfig(r=1)).schedules == {
        "lora": LoraConfig(r=1)
    }
    assert RunConfig(out="o").schedules == {}
