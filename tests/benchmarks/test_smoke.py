"""The benchmarks run and say what they measured; how fast anything is, is not tested."""

from __future__ import annotations

import asyncio
import functools
import importlib
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest
import torch
from starlette.testclient import TestClient

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The scripts, with a real-size shape that is small."""
    monkeypatch.syspath_prepend(FOLDER)
    names = ("common", "calibration", "defence", "inference", "plain_engine", "prepare", "scan")
    names += ("serving", "stage1", "training")
    found = {name: importlib.import_module(name) for name in names}
    vision = {"hidden_size": 16, "intermediate_size": 16, "image_size": 28, **SMALL}
    language = {"hidden_size": 16, "intermediate_size": 16, "num_key_value_heads": 2, **SMALL}
    monkeypatch.setattr(found["common"], "VISION_7B", found["common"].VISION_7B | vision)
    monkeypatch.setattr(found["common"], "LANGUAGE_7B", found["common"].LANGUAGE_7B | language)
    return found


def read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    assert data["machine"]["name"] and data["versions"]["torch"]
    assert all(one["q25"] <= one["median"] <= one["q75"] for one in data["seconds"].values())
    for ratio in data["ratios"]:
        bound = (ratio["at_most"], ratio["at_least"])
        assert (ratio["met"] is None) == (bound == (None, None))
    return data


@pytest.mark.parametrize("shape", ["testbed", "llava-1.5-7b"])
def test_inference(scripts: dict[str, ModuleType], shape: str, tmp_path: Path) -> None:
    options = ["--repeats", "2", "--warmup", "0", "--allow-cpu"]
    scripts["inference"].main(["--shape", shape, "--json", str(tmp_path / "out.json"), *options])
    data = read(tmp_path / "out.json")
    assert data["shape"] == shape and len(data["seconds"]) == 7
    assert {one["n"] for one in data["seconds"].values()} == {2}
    facts = data["facts"]
    assert facts["prompt_tokens"] > facts["image_tokens"] + facts["safety_tokens"]


def test_the_three_flows_give_the_same_work(scripts: dict[str, ModuleType]) -> None:
    """With the safety tokens' rows shared, two passes say what one says; all answers are whole."""
    shape = scripts["common"].SHAPES["testbed"]
    plain, ours, two = scripts["inference"].build(shape, torch.device("cpu"), shape.config())
    assert ours.backbone.model.model.vision_tower is not plain.model.model.vision_tower
    shared = {id(weight) for weight in plain.model.parameters()}
    assert {id(weight) for weight in ours.backbone.model.model.vision_tower.parameters()} <= shared
    (picture,) = scripts["inference"].evaluation_samples("style", "harmless", 1, 0)[0].images
    stream = io.BytesIO()
    shape.write(picture, stream)
    reply = ours.reply(stream.getvalue(), "what is this?", max_new_tokens=8)
    assert reply.text == two.reply(stream.getvalue(), "what is this?", 8)
    assert reply.decision.action == "allow"


def test_stage1(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    settings = ("concepts.epochs=2", "concepts.hidden=8", "concepts.depth=1")
    options = [word for setting in settings for word in ("--set", setting)]
    options += ["--samples", "3", "--repeats", "1", "--json", str(tmp_path / "out.json")]
    scripts["stage1"].main(options)
    data = read(tmp_path / "out.json")
    assert data["seconds"].keys() == {"encode", "train", "cached", "joint"}
    assert data["facts"]["samples"] == 3 and data["facts"]["epochs"] == 2
    assert data["facts"]["paper_scale_seconds"].keys() == {"cached", "joint"}


def test_in_one_loop_each_half_of_stage_1_learns_what_it_learns_alone(
    scripts: dict[str, ModuleType],
) -> None:
    stage1, shape = scripts["stage1"], scripts["common"].SHAPES["testbed"]
    samples = stage1.alignment_samples(3, seed=0)
    bench = stage1.Bench(shape, torch.device("cpu"), shape.config(), samples, samples)
    backbone = bench.joint_backbone
    sizes = stage1.BottleneckConfig(backbone.vision_width, backbone.text_width, hidden=8, depth=1)
    joint = stage1.Joint(backbone, stage1.SafetyBottleneck(sizes), bench.joint_model)
    rows = [weight for weight in bench.joint_model.parameters() if weight.requires_grad]
    half = list(joint.bottleneck.parameters())

    concepts, language = joint.losses(samples)
    (concepts + language).backward()
    together = [weight.grad for weight in [*half, *rows]]
    apart = [*torch.autograd.grad(joint.losses(samples)[0], half)]
    apart += torch.autograd.grad(joint.losses(samples)[1], rows)
    assert all(one is not None and one.any() for one in together)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", ["testbed", "llava-1.5-7b"])
def test_training(scripts: dict[str, ModuleType], shape: str, tmp_path: Path) -> None:
    settings = ("concepts.hidden=8", "concepts.depth=1", "concepts.tokens=2", "concepts.heads=2")
    settings += ("tokens.count=2", "tokens.batch_size=2", "tokens.workers=0")
    options = [word for setting in settings for word in ("--set", setting)]
    options += ["--shape", shape, "--samples", "2", "--repeats", "1", "--peak", "1e12"]
    scripts["training"].main([*options, "--json", str(tmp_path / "out.json"), "--allow-cpu"])
    data = read(tmp_path / "out.json")
    ours, plain = {"concepts", "tokens", "lora"}, {"plain tokens", "plain lora"}
    assert data["seconds"].keys() == ours | plain
    facts = data["facts"]
    assert facts["operations_per_sample"].keys() == ours
    assert facts["operations_per_sample"]["lora"] > facts["operations_per_sample"]["concepts"] > 0
    assert all(0 < share < 1 for share in facts["mfu"].values())


def test_scan(
    scripts: dict[str, ModuleType], run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from psa_vlm.scan.output import Counts
    from psa_vlm.scan.run import Scan, Summary

    def scan(job: Scan, actors: int) -> Summary:
        images = len(list(Path(job.source).glob("*.png")))
        assert not Path(job.out).exists()
        return Summary(Counts(images, 0, {}), {}, images, 1 / actors)

    monkeypatch.setattr(scripts["scan"], "scan", scan)
    options = ["--images", "3", "--actors", "1", "2", "--json", str(tmp_path / "out.json")]
    scripts["scan"].main([str(run_dir), *options])
    data = json.loads((tmp_path / "out.json").read_text())
    assert [(one["actors"], one["images"], one["speedup"]) for one in data["scans"]] == [
        (1, 3, 1.0),
        (2, 3, 2.0),
    ]
    assert data["versions"]["ray"]


def test_calibration(scripts: dict[str, ModuleType], run_dir: Path, tmp_path: Path) -> None:
    options = ["--scenes", "300", "--recalibrations", "4", "--json", str(tmp_path / "out.json")]
    options += ["--miss-rate", "0.4", "--false-refusal", "0.4", "--confidence", "0.7"]
    scripts["calibration"].main([str(run_dir), *options])
    data = json.loads((tmp_path / "out.json").read_text())
    assert len(data["rows"]) == 7 and data["command"].startswith("python benchmarks/calibration.py")
    for row in data["rows"]:
        assert row["promised"] == 0.4 and 0 <= row["mean"] <= row["worst"] <= 1
        assert row["interval"][0] <= row["kept"] <= row["interval"][1]
        assert row["met"] == (row["interval"][1] >= 0.7)


def test_prepare(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    scripts["prepare"].main(["--rows", "70", "--images", "5", "--json", str(tmp_path / "out.json")])
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["rows"] == 70 and data["images"] == 5 and data["machine"]["name"]
    assert sum(data["splits"].values()) <= 70 and data["peak"] >= data["before"] > 10


def test_serving_counts_what_came_and_what_is_not_on_record(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from psa_vlm.serving.audit import Audit, Entry

    serving, log = scripts["serving"], tmp_path / "audit.db"
    audit, numbers = Audit(f"sqlite:///{log}"), iter(range(1000))

    def reply(request: httpx2.Request) -> httpx2.Response:
        number = next(numbers)
        if number == 1:
            raise httpx2.ConnectError("gone")
        if number == 2:
            return httpx2.Response(500)
        if number > 3:  # the fourth is forgotten
            named = {"name": "n", "hash": "0"}
            audit.append(Entry(str(number), "chat", None, (), {}, None, None, named, named))
        return httpx2.Response(200, json={"id": str(number)})

    client = functools.partial(httpx2.AsyncClient, transport=httpx2.MockTransport(reply))
    monkeypatch.setattr(serving.httpx2, "AsyncClient", client)
    asked = serving.bodies()
    load = asyncio.run(serving.drive("http://there", asked, 2, 0.5))
    facts = load.facts(0.5)
    assert facts["replies"] == facts["statuses"]["200"] == len(load.ids) > 4
    assert (facts["broken"], facts["statuses"]["500"], facts["server_errors"]) == (1, 1, 1)
    assert facts["p95_ms"] >= facts["p50_ms"] > 0
    assert serving.missing(log, load.ids) == 2  # the first was forgotten too
    audit.close()
    assert {one["model"] for one in asked} == {"run"}


def test_serving_finds_the_address_of_what_it_starts(scripts: dict[str, ModuleType]) -> None:
    program = "import sys, time; print('at http://127.0.0.1:1', file=sys.stderr, flush=True)"
    served = scripts["serving"].served
    with served(sys.executable, "-c", f"{program}; time.sleep(60)") as (process, url, seconds):
        assert (url, process.poll()) == ("http://127.0.0.1:1/v1", None) and seconds > 0
    assert process.poll() is not None
    with pytest.raises(SystemExit, match="did not start:\nno model"):
        served(sys.executable, "-c", "raise SystemExit('no model')").__enter__()


def test_serving_tells_what_psa_vlm_costs_and_fails_on_a_5xx(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serving, out = scripts["serving"], tmp_path / "out.json"
    good = {"replies": 9, "p50_ms": 12.0, "p95_ms": 30.0, "server_errors": 0, "not_on_record": 0}
    plain = {"replies": 9, "p50_ms": 10.0, "p95_ms": 20.0, "server_errors": 0}
    monkeypatch.setattr(serving, "measure", lambda *_: {"load": good, "killed": good})
    monkeypatch.setattr(serving, "compare", lambda *_: {"allowed": good, "plain": plain})
    serving.main(["run", "--plain", "--json", str(out)])
    assert json.loads(out.read_text())["overhead"] == {"p50_ms": 2.0, "p95_ms": 10.0}
    for bad in ("server_errors", "not_on_record"):
        monkeypatch.setattr(serving, "measure", lambda *_, bad=bad: {"killed": good | {bad: 1}})
        with pytest.raises(SystemExit, match="a 5xx, or a reply is not on record"):
            serving.main(["run", "--json", str(out)])


def test_the_plain_engine_says_what_the_service_says_when_it_allows(
    scripts: dict[str, ModuleType], run_dir: Path
) -> None:
    """Or the difference between the two would not be what psa-vlm costs."""
    from psa_vlm import Policy, PsaVlm

    allow = Policy.from_text(scripts["serving"].ALLOW)
    body = scripts["serving"].bodies()[0]
    image, text = body["messages"][0]["content"]
    picture = scripts["plain_engine"].picture(image["image_url"]["url"])
    app = scripts["plain_engine"].create_app(run_dir)
    with TestClient(app) as client:
        reply = client.post("/v1/chat/completions", json=body).json()
    ours = PsaVlm.from_pretrained(run_dir).reply(
        picture, text["text"], allow, max_new_tokens=body["max_tokens"]
    )
    assert ours.decision.action == "allow"
    assert reply["choices"][0]["message"]["content"] == ours.text != ""


def test_the_real_size_needs_cuda(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("inference", "stage1", "training"):
        with pytest.raises(SystemExit) as stopped:
            scripts[name].main(["--shape", "llava-1.5-7b"])
        assert stopped.value.code == 2
        assert "needs a CUDA device" in capsys.readouterr().err.splitlines()[-1]


def test_defence(scripts: dict[str, ModuleType], run_dir: Path, tmp_path: Path) -> None:
    one = ("--scenes", "2", "--epochs", "1", "--requests", "1", "--steps", "1", "--restarts", "1")
    out = tmp_path / "out.json"
    where = ("--work", str(tmp_path / "work"), "--json", str(out))
    what = ("--recipes", "adversarial", "--beside", str(run_dir))
    scripts["defence"].main([str(run_dir), *what, *one, *where])
    rows = json.loads(out.read_text())["rows"]
    assert [row["recipe"] for row in rows] == ["adversarial", str(run_dir)]
    for row in rows:
        assert len(row) == 6
        assert {share["n"] for name, share in row.items() if name != "recipe"} == {1}
