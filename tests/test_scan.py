"""A scan: every image becomes one row, whatever it is and however often the scan was killed."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image

from psa_vlm.data.images import open_images
from psa_vlm.errors import ConfigError, InputError, MissingExtra, PsaVlmError
from psa_vlm.inference import PsaVlm
from psa_vlm.policy.policy import VERDICT_ERROR, Policy
from psa_vlm.scan import assess, check_extra, output, run, source
from psa_vlm.scan.assess import opened
from psa_vlm.scan.output import Output
from psa_vlm.scan.run import Scan, Worker
from psa_vlm.scan.source import Source, Unit, kind

from .conftest import Psa
from .files import encode, png_by_hand

TEXT = "What is this?"


def png(colour: str = "red") -> bytes:
    return encode(Image.new("RGB", (9, 9), colour))


def bomb() -> bytes:
    """A PNG of a few bytes whose header promises 3,600,000,000 pixels."""
    return png_by_hand(60_000, 60_000, 8, 2, bytes(64))


COLOURS = ("red", "green", "blue", "white", "black")


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """Five images, in two folders, and files that are none or broken ones."""
    made = tmp_path / "in"
    (made / "sub").mkdir(parents=True)
    for index, colour in enumerate(COLOURS):
        (made / ("sub" if index % 2 else ".") / f"{index}.png").write_bytes(png(colour))
    (made / "text.png").write_text("I am a text")
    (made / "cut.JPG").write_bytes(png()[:45])
    (made / "bomb.png").write_bytes(bomb())
    (made / "notes.txt").write_text("no image")
    return made


BROKEN = {"text.png", "cut.JPG", "bomb.png"}


def tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def read(where: Path | str, column: str | None = None, rows: int = 2) -> dict[str, str | None]:
    """Key -> None for what can be opened, its error for the rest."""
    found = Source(str(where), column)
    units, _ = found.units(rows)
    images = list(opened(found.read(units)))
    assert len({one.key for one in images}) == len(images)
    assert all(bool(one.frames) == (one.error is None) for one in images)
    return {one.key: one.error for one in images}


# --- what is read --------------------------------------------------------------------------------


def test_a_folder_is_read_whole_and_its_broken_files_are_told(folder: Path) -> None:
    units, left_out = Source(str(folder)).units(2)
    assert left_out == {".txt": 1}
    assert units == sorted(units) and len(units) == 8
    found = read(folder)
    assert set(found) == {"0.png", "2.png", "4.png", "sub/1.png", "sub/3.png"} | BROKEN
    assert {key for key, error in found.items() if error} == BROKEN
    assert "not an image" in (found["text.png"] or "")
    assert "more than 50,000,000 pixels" in (found["bomb.png"] or "")


def test_one_file_is_a_source_too(folder: Path) -> None:
    assert read(folder / "0.png") == {"0.png": None}


def test_any_file_system(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/photos/a/1.png", png())
    assert read("memory://bucket/photos") == {"a/1.png": None}
    with pytest.raises(InputError, match=r"nonsense://x: .*nonsense"):
        read("nonsense://x")


def test_what_is_gone_or_too_large_is_a_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Source(str(folder)).read([Unit("none.png")])
    assert [(one.key, one.content) for one in gone] == [("none.png", None)]
    monkeypatch.setattr(source, "MAX_BYTES", 10)
    archive = tar(folder / "a.tar", [("x.png", png())])
    pq.write_table(pa.table({"image": [png()]}), folder / "b.parquet")
    for where in (folder / "0.png", archive, folder / "b.parquet"):
        (error,) = read(where).values()
        assert error == "more than 10 bytes; scale it down"


def test_tars(tmp_path: Path) -> None:
    members = [("1.jpg", png()), ("1.json", b"{}"), ("d/2.png", b"?"), ("1.jpg", png("blue"))]
    tar(tmp_path / "0.tar", members)
    tar(tmp_path / "1.tar", [("1.json", b"{}")])
    found = read(tmp_path)
    assert list(found) == ["0.tar#1.jpg", "0.tar#d/2.png", "0.tar#1.jpg (2)", "1.tar"]
    assert "not an image" in (found["0.tar#d/2.png"] or "")
    assert found["1.tar"] == "no image in this tar"


@pytest.mark.parametrize(
    ("damage", "whole"),
    [
        (lambda content: content[:1500], 1),  # within the second image's header
        (lambda content: content[:1024], 1),  # just before it
        (lambda content: content[:1024] + b"x" * 512 + content[1536:], 1),
        (lambda content: content[:1600], 1),  # within its content
        (lambda content: b"not a tar", 0),
    ],
)
def test_a_damaged_tar_never_ends_in_silence(
    tmp_path: Path, damage: Callable[[bytes], bytes], whole: int
) -> None:
    path = tar(tmp_path / "a.tar", [("1.png", png()), ("2.png", png()), ("3.png", png())])
    content = path.read_bytes()
    assert len(png()) <= 512  # so that each member takes two blocks
    path.write_bytes(damage(content))
    found = read(path)
    assert [key for key, error in found.items() if not error] == ["a.tar#1.png"][:whole]
    assert "tar can't be read behind its" in (found["a.tar"] or "")


def test_parquet(tmp_path: Path) -> None:
    images = [{"bytes": png(colour), "path": None} for colour in COLOURS]
    images[3]["bytes"] = None
    table = pa.table({"id": range(5), "thumb": [png()] * 5, "image": images})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    units, _ = Source(str(tmp_path)).units(3)
    assert units == [Unit("a.parquet", 0, 2), Unit("a.parquet", 2, 3)]
    found = read(tmp_path, rows=3)
    assert found == {f"a.parquet#{i}": None for i in range(5)} | {
        "a.parquet#3": "no image in this row"
    }
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no more")
    assert "Parquet file can't be read" in (read(tmp_path)["b.parquet"] or "")
    assert len(read(tmp_path / "a.parquet", column="thumb")) == 5
    with pytest.raises(InputError, match=r"column 'id' holds no encoded images.*thumb, image"):
        read(tmp_path, column="id")
    (tmp_path / "b.parquet").unlink()
    pq.write_table(
        table.drop_columns("image").append_column("x", [[b"?"] * 5]), tmp_path / "c.parquet"
    )
    with pytest.raises(InputError, match=r"c\.parquet: several columns of bytes \(thumb, x\)"):
        read(tmp_path)
    pq.write_table(table.select(["id"]), tmp_path / "c.parquet")
    _, left_out = Source(str(tmp_path)).units(3)
    assert left_out == {".parquet": 1}


def test_nothing_to_scan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        Source(str(tmp_path / "none")).units(1)
    with pytest.raises(InputError, match="no images; give a folder of"):
        Source(str(tmp_path)).units(1)
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match="no images among 1 files"):
        Source(str(tmp_path)).units(1)


def test_kinds() -> None:
    names = ("A.PNG", "a.tar.gz", "a.parquet", "a.heic", "a.txt", "tar", ".png")
    assert [kind(name) for name in names] == ["image", "tar", "parquet", "image", None, None, None]


# --- from images to rows -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(aligned_run: Path) -> PsaVlm:
    return PsaVlm.from_pretrained(aligned_run)


@pytest.fixture()
def job(folder: Path, tmp_path: Path, aligned_run: Path) -> Scan:
    """A scan of the folder under a strict policy, two images at a time, three in a part."""
    policy = Policy.load("strict")
    return Scan(str(folder), str(tmp_path / "out"), aligned_run, policy, TEXT, batch=2, rows=3)


@pytest.fixture()
def loaded(model: PsaVlm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves every worker the loading of its run."""
    monkeypatch.setattr(PsaVlm, "from_pretrained", lambda *args, **kwargs: model)


def here(job: Scan, only: int | None = None) -> list[dict[str, Any]]:
    """Do the parts of a scan in this process, without Ray; what its actor tells of each."""
    units, _ = Source(job.source).units(job.rows)
    result = Output(job.out)
    result.begin({"text": job.text})
    worker = Worker(job, 0)
    return [
        {name: one for name, (one,) in worker({"part": pa.array([part])}).items()}
        for part in result.plan(units, job.rows)[:only]
    ]


def table(out: Path | str) -> dict[str, dict[str, Any]]:
    found = ds.dataset(out).to_table().to_pylist()
    assert len({row["key"] for row in found}) == len(found)
    return {row["key"]: row for row in found}


def check_rows(found: dict[str, dict[str, Any]], folder: Path, model: PsaVlm) -> None:
    """The rows are those of `PsaVlm.assess` and the strict policy, and broken images are none."""
    strict = Policy.load("strict")
    for key, row in found.items():
        if key in BROKEN:
            assert row["error"] and "\n" not in row["error"]
            assert row["type"] is row["level"] is row["type_probs"] is row["level_probs"] is None
            assert (row["action"], row["rule"]) == ("refuse", VERDICT_ERROR)
            continue
        verdict = model.assess(folder / key, TEXT)
        decision = strict.decide(verdict, model.taxonomy)
        (image,) = verdict.images
        assert (row["type"], row["level"], row["error"]) == (verdict.type, verdict.level, None)
        assert (row["action"], row["rule"]) == (decision.action, decision.rule)
        assert row["type_probs"] == pytest.approx(image.type_probs, abs=1e-5)
        assert row["level_probs"] == pytest.approx(image.level_probs, abs=1e-5)
        assert row["sha256"] == hashlib.sha256((folder / key).read_bytes()).hexdigest()


@pytest.mark.usefixtures("loaded")
def test_every_image_is_a_row_as_assess_has_it(job: Scan, folder: Path, model: PsaVlm) -> None:
    told = here(job)
    assert [part["images"] for part in told] == [3, 3, 2]
    assert all(part["ended"] >= part["begun"] and not part["failed"] for part in told)
    found = table(job.out)
    assert len(found) == 8
    check_rows(found, folder, model)
    counts = Output(job.out).counts()
    assert (counts.images, counts.errors) == (8, 3)
    assert sum(counts.by["type"].values()) == sum(counts.by["level"].values()) == 5
    assert sum(counts.by["action"].values()) == 8
    assert counts.first_error and counts.first_error.partition(":")[0] in BROKEN


def test_no_image_fails_because_of_its_neighbour(
    model: PsaVlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = model.backbone.encode

    def poisoned(images: Any, *rest: Any) -> Any:
        if any(image.getpixel((0, 0)) == (0, 0, 255) for image in images):
            raise RuntimeError("out of\nmemory")
        return encode(images, *rest)

    monkeypatch.setattr(model.backbone, "encode", poisoned)
    images = [
        assess.Opened(colour, "0", open_images(png(colour))) for colour in ("red", "blue", "green")
    ]
    found = list(assess.rows(model, model.policy, TEXT, images, 8))
    assert [row["error"] for row in found] == [None, "RuntimeError: out of memory", None]
    assert found[1]["level"] is None and found[1]["action"] == "refuse"
    assert found[0]["level"] and found[2]["level"]


def test_all_frames_count_and_the_worst_decides(model: PsaVlm, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in COLOURS]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    images = opened(Source(str(tmp_path)).read([Unit("a.gif")]))
    (row,) = assess.rows(model, model.policy, TEXT, images, 8)
    verdict = model.assess(tmp_path / "a.gif", TEXT)
    assert len(verdict.images) == 5 and (row["type"], row["level"]) == (verdict.type, verdict.level)


def test_what_goes_wrong_with_the_run_or_the_disk_is_told(
    job: Scan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (told,) = here(replace(job, base=tmp_path), 1)
    assert "if the base model moved" in told["failed"]
    assert not Output(job.out).done()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output.os, "replace", full)
    job = replace(job, out=str(tmp_path / "other"))
    with pytest.raises(PsaVlmError, match=r"scan\.json: can't be written .*No space left"):
        Output(job.out).begin({})


# --- the result ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("loaded")
def test_a_scan_goes_on_where_it_stopped(job: Scan, folder: Path, model: PsaVlm) -> None:
    here(job, only=1)
    (first,) = Path(job.out).glob("*.parquet")
    before = (first.stat().st_ino, first.stat().st_mtime_ns)
    (Path(job.out) / "_scan" / "part-000001.parquet.1.writing").write_bytes(b"half of")
    (folder / "new.png").write_bytes(png("yellow"))  # came since then
    assert [part["images"] for part in here(job)] == [3, 2, 1]
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == before
    assert len(table(job.out)) == 9
    assert not list(Path(job.out).rglob("*.writing"))
    assert here(job) == []
    check_rows(table(job.out), folder, model)


@pytest.mark.usefixtures("loaded")
def test_another_part_size_reads_nothing_twice(job: Scan, folder: Path) -> None:
    images = pa.table({"image": [png()] * 6})
    pq.write_table(images, folder / "a.parquet", row_group_size=1)
    here(job, only=4)
    here(replace(job, rows=5))
    assert len(table(job.out)) == 8 + 6


def test_a_folder_holds_one_scan(tmp_path: Path) -> None:
    result = Output(str(tmp_path / "out"))
    for _ in range(2):
        result.begin({"text": "a", "model": "b"})
    with pytest.raises(ConfigError, match=r"out: holds a scan with other text, policy; choose"):
        result.begin({"text": "b", "model": "b", "policy": "c"})
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no result of a scan"):
        Output(str(tmp_path)).begin({})
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["thesis.txt"]


def test_a_result_on_another_file_system(model: PsaVlm) -> None:
    result = Output("memory://results/one")
    result.begin({"text": "a"})
    assert result.plan([Unit("a.png"), Unit("b.tar"), Unit("c.png")], 2) == [0, 1]
    assert result.units(0) == [Unit("a.png"), Unit("c.png")]
    row = dict.fromkeys(output.schema(model.taxonomy).names) | {"key": "a", "action": "allow"}
    result.write(1, [row], model.taxonomy)
    again = Output("memory://results/one")
    again.begin({"text": "a"})
    assert again.plan([Unit("a.png"), Unit("b.tar"), Unit("c.png")], 2) == [0]
    assert again.counts().images == 1
    with pytest.raises(ConfigError, match="other text"):
        again.begin({"text": "b"})


# --- the command, without Ray --------------------------------------------------------------------


@pytest.fixture()
def psa_scan(psa: Psa, monkeypatch: pytest.MonkeyPatch, aligned_run: Path) -> Psa:
    """Runs `psa-vlm scan` in this process, its actor too."""

    def assessed(job: Scan, parts: list[int], actors: int, gpus: float) -> Iterator[Any]:
        worker = Worker(job, gpus)
        for part in parts:
            yield {name: one for name, (one,) in worker({"part": pa.array([part])}).items()}

    monkeypatch.setattr(run, "_ray", lambda address, actors: nullcontext((1, 0)))
    monkeypatch.setattr(run, "_assessed", assessed)
    return lambda *arguments: psa("scan", *arguments, "--model", aligned_run)


@pytest.mark.usefixtures("loaded")
def test_the_command(psa_scan: Psa, folder: Path, tmp_path: Path, model: PsaVlm) -> None:
    out = tmp_path / "out"
    code, told, err = psa_scan(folder, out, "--rows", 3, "--policy", "strict")
    assert (code, err.strip()) == (0, "")
    assert "images/s" in told and ".txt 1" in told
    check_rows(table(out), folder, model)
    code, told, _ = psa_scan(folder, out, "--policy", "strict", "--json")  # nothing is left to do
    facts = json.loads(told)
    assert (code, facts["images"], facts["errors"], facts["assessed"]) == (0, 8, 3, 0)
    assert facts["images_per_second"] is None and facts["actions"]["refuse"] >= 3


@pytest.mark.usefixtures("loaded")
def test_bad_input_is_one_line(psa_scan: Psa, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert psa_scan(folder / "0.png", out)[0] == 0
    for arguments, words in (
        ((tmp_path / "none", out), "none: no such file or folder"),
        ((folder, folder / "out"), "which is scanned"),
        ((folder, out), "holds a scan with other source"),
        ((folder / "0.png", out, "--text", "Hi?"), "holds a scan with other text; choose another"),
        ((folder / "0.png", out, "--policy", "strict"), "other policy"),
        ((folder / "0.png", out, "--text", " "), "the text is empty"),
        ((folder / "0.png", tmp_path), "no result of a scan"),
    ):
        code, told, err = psa_scan(*arguments)
        (line,) = err.strip().splitlines()
        assert (code, told) == (2, "") and line.startswith("error: ") and words in line
    code, _, err = psa_scan(folder / "text.png", tmp_path / "other")
    assert code == 1 and "error: no image could be assessed; text.png: " in err


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psa_vlm.scan.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'psa-vlm\[scan\]'"):
        check_extra()


# --- Ray -----------------------------------------------------------------------------------------

PROGRAM = "from psa_vlm.cli import main; main()"


def start(job: Scan, *options: str) -> subprocess.Popen[str]:
    command = ["scan", job.source, job.out, "--model", str(job.model), "--policy", "strict"]
    command += ["--rows", "1", "--actors", "1", "--json", *options]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command],
        env=os.environ | {"RAY_worker_niceness": "0"},  # or a busy machine starves them
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_and_gone_on_with(job: Scan, folder: Path, model: PsaVlm) -> None:
    for index in range(60):
        (folder / f"more-{index:02}.png").write_bytes(png(COLOURS[index % 5]))
    process = start(job)
    while len(list(Path(job.out).glob("part-*.parquet"))) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in Path(job.out).glob("*.parquet")}
    assert 4 <= len(before) < 68
    process = start(job)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "WARN" not in err and "Traceback" not in err
    told = json.loads(out)
    assert (told["images"], told["errors"], told["left_out"]) == (68, 3, {".txt": 1})
    assert told["assessed"] <= 68 - len(before) and told["images_per_second"] > 0
    found = table(job.out)
    assert len(found) == 68
    check_rows(found, folder, model)
    untouched = [path for path in before if path.stat().st_mtime_ns == before[path]]
    assert len(untouched) == len(before)
