"""Training through the language model: exactly the named parameters change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from psa_vlm.data.images import open_images
from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import DataError
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.tokens import add_safety_tokens
from psa_vlm.training.fit import Work
from psa_vlm.training.language import (
    Collate,
    _Answers,
    dialogues,
    lengths,
    train_lora,
    train_tokens,
)


def copied(backbone: Backbone) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}


@pytest.mark.parametrize("checkpoint", ["llava_dir", "tied_llava_dir"])
def test_tokens_change_their_rows_alone(
    checkpoint: str,
    samples: list[Sample],
    schedules: Any,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder: Path = request.getfixturevalue(checkpoint)
    work = Work(tmp_path, seed=5, report_to=())
    untrained = Backbone.from_pretrained(folder)
    ids = list(add_safety_tokens(untrained, 3, work.seed))
    before = copied(untrained)
    trained = Backbone.from_pretrained(folder)
    history = train_tokens(trained, samples, schedules["tokens"], work)
    after = trained.model.state_dict()
    assert before.keys() == after.keys()
    rows = trained.model.get_input_embeddings().weight
    for name, tensor in after.items():
        if tensor.data_ptr() != rows.data_ptr():
            assert torch.equal(tensor, before[name]), name
            continue
        changed = (tensor != before[name]).any(1).nonzero().flatten().tolist()
        assert changed == ids
    assert len(history) == 6
    assert not any(parameter.requires_grad for parameter in trained.model.parameters())
    assert trained.safety_token_ids == tuple(ids)


def test_no_tokens_change_nothing(
    backbone: Backbone, samples: list[Sample], schedules: Any, tmp_path: Path
) -> None:
    before = copied(backbone)
    none = schedules["tokens"].model_copy(update={"count": 0})
    assert train_tokens(backbone, samples, none, Work(tmp_path)) == []
    assert all(torch.equal(t, before[n]) for n, t in backbone.model.state_dict().items())
    assert backbone.safety_token_ids == ()


def test_lora_changes_its_own_matrices_alone(
    backbone: Backbone, samples: list[Sample], schedules: Any, tmp_path: Path
) -> None:
    before = copied(backbone)
    adapter, history = train_lora(
        backbone, dialogues(samples), schedules["lora"], Work(tmp_path, report_to=())
    )
    after = backbone.model.state_dict()
    base = {n.replace(".base_layer", ""): t for n, t in after.items() if "lora_" not in n}
    assert base.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.items())
    added = [name for name in after if "lora_" in name]
    assert len(added) == 2 * 7 * 2  # layers x linear layers x (A, B)
    assert all("language_model.layers" in name for name in added)
    assert all(after[name].any() for name in added)  # B starts at zero, and has learned
    assert history[-1]["loss"] < history[0]["loss"]
    assert not any(parameter.requires_grad for parameter in adapter.parameters())
    assert not backbone.model.training


def test_gradient_checkpointing_changes_no_result(
    llava_dir: Path, samples: list[Sample], schedules: Any, tmp_path: Path
) -> None:
    outcomes = []
    for on in (False, True):
        backbone = Backbone.from_pretrained(llava_dir)
        config = schedules["lora"].model_copy(update={"gradient_checkpointing": on, "epochs": 1})
        work = Work(tmp_path / f"{on}", report_to=())
        train_lora(backbone, dialogues(samples), config, work)
        assert not backbone.model.is_activation_checkpointing
        outcomes.append(backbone.model.state_dict())
    torch.testing.assert_close(*outcomes)


def test_the_loss_is_on_the_answer_beside_image_and_hint(
    backbone: Backbone, samples: list[Sample]
) -> None:
    text_only = Sample("t", (), (Turn("user", "Hi?"), Turn("assistant", "Hello.")))
    rows = dialogues([samples[0], text_only], ["Safe Hint: take care.", None])
    task, collate = _Answers(backbone.model, backbone), Collate(backbone)
    loss = task(**collate(rows))["loss"]
    inputs = backbone.prompts(
        [row.conversation for row in rows],
        [1, 0],
        ["Safe Hint: take care.", None],
        answers=["It is 0.", "Hello."],
    )
    (image,) = open_images(samples[0].images[0])
    pixels = backbone.processor.image_processor([image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = backbone.model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=pixels,
        ).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert task(**collate([replace(row, hint=None) for row in rows]))["loss"] != loss


def test_dialogues_end_with_the_question() -> None:
    turns = (
        Turn("user", "A?"),
        Turn("assistant", "B."),
        Turn("user", "C?"),
        Turn("assistant", "D."),
    )
    (row,) = dialogues([Sample("s", (), turns)])
    assert row.conversation == turns[:3] and row.answer == "D." and row.hint is None


def test_samples_without_answer_are_counted(samples: list[Sample]) -> None:
    silent = [replace(s, conversation=s.conversation[:1]) for s in samples[:2]]
    with pytest.raises(DataError, match="2 of 6 samples have no answer, s0 the first"):
        dialogues([*silent, *samples[2:]])


def test_what_cannot_be_written_is_named_before_training(
    backbone: Backbone, samples: list[Sample], schedules: Any, tmp_path: Path
) -> None:
    endless = Turn("assistant", "good " * backbone.max_tokens)
    long = replace(samples[3], conversation=(samples[3].conversation[0], endless))
    with pytest.raises(DataError, match=r"^sample s3: the prompt is \d+ tokens long"):
        train_lora(backbone, dialogues([*samples[:3], long]), schedules["lora"], Work(tmp_path))
    assert not list(tmp_path.iterdir())


# --- batches -------------------------------------------------------------------------------------


def of_lengths(samples: list[Sample], count: int) -> list[Sample]:
    """Samples whose answers are one to a hundred words long, and every third has no image."""
    return [
        replace(
            samples[i % 6],
            images=samples[i % 6].images if i % 3 else (),
            conversation=(
                samples[i % 6].conversation[0],
                Turn("assistant", "good " * (1 + 37 * i % 100)),
            ),
        )
        for i in range(count)
    ]


def test_a_step_is_the_same_in_however_many_parts(
    llava_dir: Path, samples: list[Sample], schedules: Any, tmp_path: Path
) -> None:
    outcomes = []
    for batch, accumulation in ((4, 1), (1, 4)):
        backbone = Backbone.from_pretrained(llava_dir)
        size = {"batch_size": batch, "accumulation": accumulation, "epochs": 1, "dropout": 0.0}
        config = schedules["lora"].model_copy(update=size)
        rows = dialogues(of_lengths(samples, 8))
        _, history = train_lora(backbone, rows, config, Work(tmp_path / f"{batch}", report_to=()))
        outcomes.append([point["loss"] for point in history])
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_processes_that_read_ahead_change_no_result(
    llava_dir: Path, samples: list[Sample], schedules: Any, tmp_path: Path
) -> None:
    outcomes = []
    for workers in (0, 2):
        backbone = Backbone.from_pretrained(llava_dir)
        config = schedules["lora"].model_copy(update={"workers": workers, "epochs": 1})
        work = Work(tmp_path / f"{workers}", report_to=())
        train_lora(backbone, dialogues(of_lengths(samples, 8)), config, work)
        outcomes.append(backbone.model.state_dict())
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)


def test_little_is_padding_where_lengths_are_grouped(
    llava_dir: Path, samples: list[Sample], schedules: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    waste = {}
    for grouped in (False, True):
        backbone = Backbone.from_pretrained(llava_dir)
        shapes: list[tuple[int, int]] = []

        def count(self: Any, attention_mask: Tensor, seen: Any = shapes, **_: Any) -> Any:
            seen.append((int(attention_mask.sum()), attention_mask.numel()))
            weight = next(one for one in self.parameters() if one.requires_grad)
            return {"loss": 0 * weight.sum()}

        monkeypatch.setattr(_Answers, "forward", count)
        changes = {"batch_size": 2, "epochs": 1, "group_by_length": grouped}
        config = schedules["lora"].model_copy(update=changes)
        rows = dialogues(of_lengths(samples, 200))
        train_lora(backbone, rows, config, Work(tmp_path / f"{grouped}", report_to=()))
        assert sum(real for real, _ in shapes) == sum(lengths(backbone, rows))
        waste[grouped] = 1 - sum(real for real, _ in shapes) / sum(all_ for _, all_ in shapes)
    assert waste[True] < 0.05 < waste[False]
