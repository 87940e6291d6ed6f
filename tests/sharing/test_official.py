"""The authors' checkpoints as our runs, and what can't become one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from psa_vlm.errors import CheckpointError, ConfigError, PsaVlmError
from psa_vlm.inference import PsaVlm
from psa_vlm.sharing.official import import_official
from psa_vlm.taxonomy import Taxonomy

PARITY = Path(__file__).parents[1] / "data" / "parity" / "official_tiny.safetensors"
TENSORS = load_file(PARITY)
STATE = {key.removeprefix("state."): TENSORS[key] for key in TENSORS if key.startswith("state.")}
HEAD = "safe_part.safety_head.bias"


def saved(path: Path, state: dict[str, Any]) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def imported(llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    state = saved(folder / "state.safetensors", STATE)
    import_official(state, folder / "run", str(llava_dir))
    return folder / "run"


def test_it_gives_the_authors_numbers(imported: Path) -> None:
    model = PsaVlm.from_pretrained(imported)
    given = {key.removeprefix("input."): value for key, value in TENSORS.items()}
    with torch.no_grad():
        out = model.bottleneck(
            given["vision_features"], given["text_embeds"], given["attention_mask"]
        )
    for name in ("level_logits", "type_logits"):
        torch.testing.assert_close(
            getattr(out, name), TENSORS[f"expected.{name}"], atol=1e-5, rtol=0
        )
    rows = model.backbone.model.get_input_embeddings().weight[list(model.backbone.safety_token_ids)]
    torch.testing.assert_close(rows, STATE["safety_query_tokens_2"][0])


def test_its_verdicts_are_read_at_the_begin_mark(imported: Path, picture: Path) -> None:
    """Which is where the authors read them, so that the question can't matter."""
    model = PsaVlm.from_pretrained(imported)
    verdicts = [model.assess(picture, text) for text in ("Hi", "What is this?")]
    first, second = (one.images[0].type_probs for one in verdicts)
    assert first == pytest.approx(second, abs=1e-6)
    assert verdicts[0].error is None
    assert model.reply(picture, "Hi", concepts={"privacy": "low"}).text is not None


def test_its_card_says_where_it_is_from_and_no_more(imported: Path) -> None:
    card = (imported / "README.md").read_text(encoding="utf-8")
    assert "Imported from `state.safetensors`" in card
    assert "| trained | not known |" in card and "| safety tokens | 8 before each image |" in card


@pytest.mark.parametrize("name", ["state.bin", "state.pt", "state.safetensors"])
def test_what_stands_before_the_names_goes(
    llava_dir: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = {f"base_model.model.{key}": tensor for key, tensor in STATE.items()}
    path = saved(tmp_path / name, {**state, "model.layers.0.weight": torch.ones(2)})
    import_official(path, tmp_path / "run", str(llava_dir))
    assert "left out 1 tensors of other modules (model.layers.0.weight, ...)" in caplog.text


def without(*keys: str) -> dict[str, Any]:
    return {key: tensor for key, tensor in STATE.items() if key not in keys}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "tokens 1": (without("safety_query_tokens"), "no tensor for tokens"),
    "tokens 2": (without("safety_query_tokens_2"), "no safety_query_tokens_2"),
    "head": (without(HEAD), r"missing head\.to_level\.bias"),
    "shape": ({**STATE, HEAD: torch.zeros(3)}, r"safety_head\.bias has shape \[3\]"),
    "unknown": ({**STATE, "safe_part.third.weight": torch.zeros(3)}, "unknown safe_part.third"),
    "rows": (
        {**STATE, "safety_query_tokens_2": torch.zeros(1, 8, 16)},
        "safety_query_tokens_2 of width 16, but those of .* are 32 wide; give the base model",
    ),
    "nothing": ({"lm_head.weight": torch.zeros(3)}, "none of the authors' safety modules"),
}


@pytest.mark.parametrize(("state", "told"), BAD.values(), ids=BAD.keys())
def test_a_bad_state_is_one_line_that_names_the_file(
    llava_dir: Path, tmp_path: Path, state: dict[str, Any], told: str
) -> None:
    path = saved(tmp_path / "state.safetensors", state)
    with pytest.raises(CheckpointError, match=rf"state\.safetensors: .*{told}") as caught:
        import_official(path, tmp_path / "run", str(llava_dir))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def wider(state: dict[str, Any]) -> dict[str, Any]:
    """As of a vision encoder twice as wide."""
    from psa_vlm.model.bottleneck import BottleneckConfig, SafetyBottleneck
    from psa_vlm.model.official import load

    config = load(state).config
    made = SafetyBottleneck(
        BottleneckConfig(**{**vars(config), "vision_width": 48, "pooling": "first"})
    ).state_dict()
    block = "safe_mm_projector.proj.net.0.b1"
    ours = "projector.stage1.0"
    return {
        **state,
        f"{block}.conv1.conv.weight": made[f"{ours}.conv1.conv.weight"],
        f"{block}.downsample.conv.weight": made[f"{ours}.shortcut.conv.weight"],
        **{
            f"{block}.se.{name}": made[f"{ours}.se.{name}"]
            for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        },
    }


def test_another_base_is_named(llava_dir: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "state.safetensors", wider(STATE))
    with pytest.raises(CheckpointError, match=r"vision features of width 48, but .* are 24 wide"):
        import_official(path, tmp_path / "run", str(llava_dir))


@pytest.mark.parametrize("name", ["state.safetensors", "state.bin"])
def test_a_file_that_holds_no_tensors(llava_dir: Path, tmp_path: Path, name: str) -> None:
    for content in (None, b"no tensors at all"):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}: ") as caught:
            import_official(tmp_path / name, tmp_path / "run", str(llava_dir))
        assert "\n" not in str(caught.value)


class Other:
    """What no state dict should hold."""


def test_nothing_but_tensors_is_unpickled(llava_dir: Path, tmp_path: Path) -> None:
    torch.save({**STATE, "more": Other()}, tmp_path / "state.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        import_official(tmp_path / "state.bin", tmp_path / "run", str(llava_dir))


def test_a_taxonomy_needs_a_name_for_each(llava_dir: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "state.safetensors", STATE)
    few = Taxonomy(("weapons", "clean"), ("safe", "low", "medium", "high"), "clean")
    with pytest.raises(ConfigError, match=r"tells 7 types apart, but the taxonomy names 2"):
        import_official(path, tmp_path / "run", str(llava_dir), few)
    words = Taxonomy.default()
    mine = Taxonomy(tuple(f"my_{name}" for name in words.types), words.levels, "my_clean")
    import_official(path, tmp_path / "run", str(llava_dir), mine)
    assert PsaVlm.from_pretrained(tmp_path / "run").taxonomy == mine


def test_a_folder_or_base_that_can_not_be(llava_dir: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "state.safetensors", STATE)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: import_official(path, tmp_path, str(llava_dir)), "exists already"),
        (lambda: import_official(path, tmp_path / "run", str(tmp_path)), "can't load a vision"),
    ]
    for call, told in calls:
        with pytest.raises(PsaVlmError, match=told):
            call()
