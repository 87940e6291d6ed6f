"""What importing costs, which way imports point, and what the package offers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import find_spec, resolve_name
from pathlib import Path

import pytest

import psa_vlm

ROOT = Path(psa_vlm.__file__).parent

SURFACE = {
    "Backbone": "psa_vlm.model.backbone",
    "Decision": "psa_vlm.policy.policy",
    "Policy": "psa_vlm.policy.policy",
    "PsaVlm": "psa_vlm.inference",
    "Reply": "psa_vlm.inference",
    "SafetyBottleneck": "psa_vlm.model.bottleneck",
    "Sample": "psa_vlm.data.sample",
    "Taxonomy": "psa_vlm.taxonomy",
    "Turn": "psa_vlm.data.sample",
    "Verdict": "psa_vlm.model.verdict",
}

QUICK = [
    "psa_vlm",
    "psa_vlm.errors",
    "psa_vlm.taxonomy",
    "psa_vlm.data.sample",
    "psa_vlm.data.readers",
    "psa_vlm.cli",
    "psa_vlm.experiments",
]
HEAVY = [
    "PIL",
    "accelerate",
    "datasets",
    "fastapi",
    "inspect_ai",
    "matplotlib",
    "numpy",
    "openai",
    "pandas",
    "peft",
    "plotly",
    "prometheus_client",
    "pydantic",
    "ray",
    "safetensors",
    "scipy",
    "sklearn",
    "sqlalchemy",
    "tensorboard",
    "torch",
    "transformers",
    "uvicorn",
]

LAYERS = [
    {"errors", "progress", "strict_yaml", "taxonomy", "typed_yaml"},
    {"data"},
    {"model"},
    {"policy"},
    {"inference"},
    {"training", "evaluation", "robustness", "serving", "scan", "sharing"},
    {"testbed"},
    {"experiments"},
    {"cli"},
    {"__main__"},
]
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}


@pytest.mark.parametrize("module", [name for name in QUICK if find_spec(name)])
def test_importing_is_cheap(module: str) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    loaded = {name.partition(".")[0] for name in output.split()}
    assert "psa_vlm" in loaded
    assert not loaded & set(HEAVY)


def imports(path: Path) -> Iterator[str]:
    """Every `psa_vlm` module that a file imports, wherever in the file it does."""
    package = ".".join(path.relative_to(ROOT.parent).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            if module == "psa_vlm":  # what is imported from the top is named by its own unit
                yield from (f"psa_vlm.{alias.name}" for alias in node.names)
            elif is_ours(module):
                yield module


def is_ours(module: str) -> bool:
    return module.partition(".")[0] == "psa_vlm"


def unit_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


MODULES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    for module in imports(path):
        if module == "psa_vlm.__version__":
            continue
        # Through the package's own front door one would get past the layers.
        assert module != "psa_vlm" and module.removeprefix("psa_vlm.") not in SURFACE, module
        assert RANK[module.split(".")[1]] <= RANK[unit_of(path)], module


def test_no_two_parts_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        used = {module.split(".")[1] for module in imports(path) if "." in module}
        graph.setdefault(unit_of(path), set()).update(used - {unit_of(path), "__version__"})
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\nfrom pathlib import Path", []),
        ("import psa_vlm.data.sample as s", ["psa_vlm.data.sample"]),
        ("from psa_vlm.errors import DataError", ["psa_vlm.errors"]),
        ("from psa_vlm import errors, PsaVlm", ["psa_vlm.errors", "psa_vlm.PsaVlm"]),
        ("def f():\n    from ..policy import policy", ["psa_vlm.policy"]),
        ("if True:\n    from .verdict import Verdict", ["psa_vlm.model.verdict"]),
        ("import psa_vlm_other", []),
    ],
)
def test_the_import_finder_misses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, found: list[str]
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path / "psa_vlm")
    path = tmp_path / "psa_vlm" / "model" / "m.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert list(imports(path)) == found


def test_the_public_surface() -> None:
    assert sorted(psa_vlm.__all__) == sorted([*SURFACE, "__version__", "errors"])
    assert dir(psa_vlm) == sorted(psa_vlm.__all__)


@pytest.mark.parametrize("name", [name for name, home in SURFACE.items() if find_spec(home)])
def test_a_public_name_is_what_its_module_defines(name: str) -> None:
    value = getattr(psa_vlm, name)
    assert (value.__name__, value.__module__) == (name, SURFACE[name])


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        psa_vlm.Nonsense  # noqa: B018
