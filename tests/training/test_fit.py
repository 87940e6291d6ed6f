"""One training, on a task so small that every way of being cut off can be tried."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from psa_vlm.errors import CheckpointError, DataError, MissingExtra
from psa_vlm.training import checkpoints
from psa_vlm.training.checkpoints import COMPLETE, latest, remove_incomplete
from psa_vlm.training.config import Schedule
from psa_vlm.training.fit import History, Rows, Task, Work, check_extras, fit

SCHEDULE = Schedule(
    epochs=2, batch_size=2, learning_rate=0.1, log_every=1, checkpoint_every=2, warmup_steps=1
)
"""Eight samples, eight steps."""


class Line(Task):
    """Fits one trained layer behind a frozen one, with dropout, so that the RNG matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.trained = nn.Linear(4, 1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        hidden = nn.functional.dropout(self.frozen(x), 0.2, self.training)
        return {"loss": (self.trained(hidden)[:, 0] - y).square().mean()}


def rows(count: int = 8) -> Rows[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(1)
    return Rows(
        [(torch.randn(3, generator=made), torch.randn((), generator=made)) for _ in range(count)]
    )


def collate(batch: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    x, y = zip(*batch, strict=True)
    return {"x": torch.stack(x), "y": torch.stack(y)}


def train(folder: Path, schedule: Schedule = SCHEDULE) -> tuple[dict[str, Tensor], History]:
    task = Line()
    history = fit(task, rows(), collate, schedule, Work(folder, seed=3, report_to=()))
    assert not task.training
    return nn.Module.state_dict(task), history


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], History]:
    """The outcome of a training that nothing interrupts."""
    return train(tmp_path_factory.mktemp("whole"))


def test_what_is_frozen_stays_and_the_rest_learns(whole: Any) -> None:
    state, history = whole
    before = nn.Module.state_dict(Line())
    assert torch.equal(state["frozen.weight"], before["frozen.weight"])
    assert not torch.equal(state["trained.weight"], before["trained.weight"])
    assert [point["step"] for point in history] == list(range(1, 9))
    assert all(set(point) >= {"loss", "learning_rate", "grad_norm"} for point in history)


def test_a_finished_training_is_loaded_not_repeated(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path)
    monkeypatch.setattr(Line, "forward", lambda *args: pytest.fail("trained again"))
    state, history = train(tmp_path)
    assert_same(state, whole[0])
    assert history == whole[1]


def test_a_checkpoint_holds_the_trained_parameters_alone(tmp_path: Path) -> None:
    train(tmp_path)
    from safetensors.torch import load_file

    newest = latest(tmp_path)
    assert newest is not None and newest.name == "checkpoint-8"
    assert set(load_file(newest / "model.safetensors")) == {"trained.weight", "trained.bias"}


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def broken_safetensors(*args: Any, **kwargs: Any) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def broken_torch(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


@pytest.mark.parametrize(
    ("writer", "failure"),
    [
        ("_save_optimizer_and_scheduler", full_disk),
        ("_save", broken_safetensors),
        ("_save_rng_state", broken_torch),
    ],
)
def test_a_full_disk_keeps_the_last_good_checkpoint(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, writer: str, failure: Any
) -> None:
    from transformers import Trainer

    write, calls = getattr(Trainer, writer), []

    def fail_the_second_time(self: Any, output_dir: str, *args: Any, **kwargs: Any) -> None:
        calls.append(output_dir)
        if len(calls) == 2:
            Path(output_dir).mkdir(exist_ok=True)
            failure()
        write(self, output_dir, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, writer, fail_the_second_time)
        with pytest.raises(CheckpointError) as caught:
            train(tmp_path)
    told = str(caught.value)
    assert "\n" not in told
    assert "checkpoint-4: can't be written (" in told
    assert "checkpoint-2 is kept: free some space and run the same command again" in told
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-2"]
    state, history = train(tmp_path)
    assert_same(state, whole[0])
    assert history == whole[1]


def test_a_disk_that_is_full_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "save_model", full_disk)
    with pytest.raises(CheckpointError, match="there is no earlier one: free some space"):
        train(tmp_path)


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Line, "forward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train(tmp_path)


def test_a_checkpoint_that_was_cut_off_is_not_resumed_from(tmp_path: Path, whole: Any) -> None:
    train(tmp_path)
    (tmp_path / "checkpoint-8" / COMPLETE).unlink()
    (tmp_path / "checkpoint-8" / "model.safetensors").write_bytes(b"half of")
    state, history = train(tmp_path)
    assert_same(state, whole[0])
    assert history == whole[1]


def test_only_the_newest_complete_checkpoint_counts(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11", "checkpoint-x", "runs"):
        (tmp_path / name).mkdir()
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    newest = latest(tmp_path)
    assert newest is not None and newest.name == "checkpoint-10"
    assert [path.name for path in remove_incomplete(tmp_path)] == ["checkpoint-11"]
    assert (tmp_path / "checkpoint-x").exists()
    assert latest(tmp_path / "nowhere") is None


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    class Other(Line):
        def __init__(self) -> None:
            super().__init__()
            self.frozen.requires_grad_(True)

    train(tmp_path)
    with pytest.raises(CheckpointError, match=r"other parameters than this training \(frozen"):
        fit(Other(), rows(), collate, SCHEDULE, Work(tmp_path, report_to=()))


def test_accumulated_batches_count_as_one(tmp_path: Path) -> None:
    class Plain(Line):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            self.eval()  # without dropout the two must agree
            return super().forward(x, y)

    outcome = []
    for batch, accumulation in ((4, 1), (2, 2)):
        task = Plain()
        schedule = SCHEDULE.model_copy(update={"batch_size": batch, "accumulation": accumulation})
        work = Work(tmp_path / f"{batch}", report_to=())
        outcome.append((fit(task, rows(), collate, schedule, work), task.state_dict()))
    (one, one_state), (other, other_state) = outcome
    assert [point["loss"] for point in one] == pytest.approx([point["loss"] for point in other])
    torch.testing.assert_close(one_state, other_state)


def test_no_epochs_train_nothing(tmp_path: Path) -> None:
    state, history = train(tmp_path, SCHEDULE.model_copy(update={"epochs": 0}))
    assert_same(state, nn.Module.state_dict(Line()))
    assert history == []


def test_no_samples_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples to train on"):
        fit(Line(), rows(0), collate, SCHEDULE, Work(tmp_path, report_to=()))


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_extras(["tensorboard"])
    monkeypatch.setattr("psa_vlm.training.fit.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'psa-vlm\[train\]'"):
        check_extras([])
