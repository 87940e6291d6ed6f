"""Model cards: what is known stands there, what is not is said to be unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from psa_vlm.data.readers import read
from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import CheckpointError
from psa_vlm.inference import PsaVlm
from psa_vlm.sharing import provenance
from psa_vlm.sharing.card import write_card


def card_of(run: Path) -> tuple[ModelCard, str]:
    write_card(run)
    text = (run / "README.md").read_text(encoding="utf-8")
    return ModelCard(text), text


def sample(i: int, source: str, type: str | None = "privacy") -> Sample:
    level = None if type is None else "high"
    return Sample(f"s{i}", (), (Turn("user", "Hi"),), type, level, source)


def stage(number: int, samples: list[Sample], **config: Any) -> dict[str, Any]:
    return {"stage": number, "data": provenance.of_data(samples, []), "config": config}


def test_of_a_bare_run_nothing_is_invented(run: Path) -> None:
    card, text = card_of(run)
    assert card.data.to_dict() == {
        "library_name": "psa-vlm",
        "pipeline_tag": "image-text-to-text",
        "tags": ["psa-vlm", "safety", "concept-bottleneck"],
    }
    for line in (
        "| licence of the base model | not known; see the base model |",
        "| trained | not known |",
        "| calibration | none |",
        "What it was trained on is not known.",
        "Not known: no scorecard lies beside the weights.",
        "The probabilities are not calibrated",
    ):
        assert line in text
    assert "None" not in text and "Undefined" not in text


def test_all_that_is_known_stands_there(run: Path, make_calibration: Any) -> None:
    model = PsaVlm.from_pretrained(run)
    make_calibration(model.bottleneck).save(run / "calibration.json")
    samples = [sample(1, "a|b"), sample(2, "plain"), sample(3, "plain", None)]
    known = {
        "base": {**provenance.of_base("owner/vlm-7b"), "license": "mit"},
        "stages": [stage(1, samples, seed=7), stage(2, samples[:1], lora={"r": 256})],
        "note": None,
    }
    provenance.save(run, known)
    row = {"method": "stage2", "split": "style", "n": 40, "accuracy": None}
    row |= {"attack_success": 0.0, "ci": {"attack_success": [0.0, 0.09]}}
    (run / "scorecard.json").write_text(json.dumps({"rows": [row]}))
    card, text = card_of(run)
    assert (card.data.base_model, card.data.license) == ("owner/vlm-7b", "mit")
    for line in (
        "# owner/vlm-7b, aligned with psa-vlm",
        "| trained | concepts and safety tokens (stage I), LoRA on the language model (stage II) |",
        "3 samples. By type: privacy 2, unlabelled 1. By level: high 2, unlabelled 1.",
        r"| a\|b | 1 | not known | not known |",
        "| plain | 2 | not known | not known |",
        "seed: 7",
        "  r: 256",
        "| method | split | attack success | n |",
        "| stage2 | style | 0.000 (0.000 to 0.090) | 40 |",
        "of each type at most 1.0% missed",
        "valid until 9999-12-31",
    ):
        assert line in text, line
    assert "What it was trained on" not in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:  # no row of a table stands apart
        assert len({line.count("|") - line.count(r"\|") for line in table.splitlines()}) == 1


def test_the_code_of_a_card_runs(
    run: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, text = card_of(run)
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(picture.parent)
    code = code.replace("path/to/this/folder", str(run)).replace("photo.png", picture.name)
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_damaged_scorecard_is_named(run: Path) -> None:
    for content in ("{}", '{"rows": []}', '{"rows": [{"split": 1}]}', "no json"):
        (run / "scorecard.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"scorecard\.json: not a scorecard"):
            write_card(run)


# --- what a run was made from --------------------------------------------------------------------


def test_a_base_is_named_by_its_hub_id_or_its_folder(tmp_path: Path) -> None:
    assert provenance.of_base("owner/vlm")["id"] == "owner/vlm"
    for place in ("/gone/models/vlm", "", "../vlm/a"):
        assert set(provenance.of_base(place).values()) == {None}
    folder = tmp_path / "vlm"
    folder.mkdir()
    known = provenance.of_base(str(folder))
    assert (known["id"], known["folder"], known["license"]) == (None, "vlm", None)
    terms = {"license": "other", "license_name": "theirs", "license_link": "LICENSE"}
    for content, expected in ((yaml.safe_dump(terms), terms), ("[", {}), ("- a", {})):
        (folder / "README.md").write_text(f"---\n{content}\n---\n# A model\n")
        known = provenance.of_base(str(folder))
        assert {key: known[key] for key in terms} == {**dict.fromkeys(terms), **expected}


def test_layout_and_licence_come_from_what_was_read(tmp_path: Path, picture: Path) -> None:
    row = {"image": str(picture), "safe_type": 4, "safe_level": 3}
    row["conversations"] = [{"from": "USER", "value": "Hi"}]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([row]))
    data = provenance.of_data(read(path), [(path, None)])
    assert data == {
        "samples": 1,
        "type": {"privacy": 1},
        "level": {"high": 1},
        "sources": [
            {
                "name": "mine",
                "samples": 1,
                "layout": "PSA-VLM's or LLaVA's layout",
                "licence": None,
            }
        ],
    }


def test_a_prepared_mix_names_its_sources(tmp_path: Path, picture: Path) -> None:
    from psa_vlm.data.config import PrepareConfig
    from psa_vlm.data.prepare import prepare

    row = {"jailbreak_query": "Hi", "policy": "Privacy Violation", "image_path": picture.name}
    lines = [",".join(row), ",".join(row.values())]
    (tmp_path / "attacks.csv").write_text("\n".join(lines) + "\n")
    source = {"path": tmp_path / "attacks.csv", "images_dir": picture.parent}
    config = PrepareConfig.model_validate({"sources": [source], "splits": {"train": 1.0}})
    prepare(config, tmp_path / "mix")
    split = tmp_path / "mix" / "train"
    data = provenance.of_data(read(split), [(split, None)])
    assert data["sources"] == [
        {"name": "attacks", "samples": 1, "layout": "JailBreakV-28K", "licence": "MIT"}
    ]
