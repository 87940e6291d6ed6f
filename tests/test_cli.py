"""The command line: what it prints, and one clear line with the right exit code for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from psa_vlm.taxonomy import Taxonomy

from .conftest import Outcome, Psa
from .files import png_by_hand


@pytest.fixture()
def assess(psa: Psa, run_dir: Path) -> Psa:
    """Run `psa-vlm assess` on the tiny run."""

    def run(*arguments: object) -> Outcome:
        return psa("assess", *arguments, "--model", run_dir)

    return run


def one_line(outcome: Outcome, *words: str, code: int = 2) -> None:
    """The outcome is one line on stderr that has the words, and the exit code."""
    assert outcome.code == code, outcome
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in outcome.err


def test_help_names_every_command(psa: Psa) -> None:
    outcome = psa("--help")
    assert outcome.code == 0
    commands = (
        "demo",
        "experiment",
        "train",
        "assess",
        "chat",
        "evaluate",
        "calibrate",
        "data",
        "policy",
    )
    sharing = ("attack", "compare", "export", "faithfulness", "import-official", "push")
    for command in (*commands, *sharing, "testbed", "scan", "serve", "audit", "keys"):
        assert command in outcome.out


def test_version(psa: Psa) -> None:
    from psa_vlm import __version__

    assert psa("--version").out.strip() == __version__


def test_assess_prints_probabilities_for_people_and_json_for_programs(
    assess: Psa, picture: Path
) -> None:
    shown = assess(picture, "--text", "What is this?")
    assert shown.code == 0
    assert "illegal risk" in shown.out and "by rule" in shown.out
    told = json.loads(assess(picture, "--text", "What is this?", "--json").out)
    assert set(told["verdict"]["images"][0]["type_probs"]) == set(Taxonomy.default().types)
    assert told["decision"]["action"] in ("allow", "hint", "refuse")


def test_assess_takes_an_intervention_and_a_policy(
    assess: Psa, picture: Path, tmp_path: Path
) -> None:
    from psa_vlm.policy.policy import Policy

    policy = tmp_path / "policy.yaml"
    rules = {"*": {"low": "hint", "medium": "refuse", "high": "refuse"}}
    Policy.default().model_copy(update={"rules": rules}).to_yaml(policy)
    told = assess(
        *(picture, "--text", "Hi", "--policy", policy, "--concept", "privacy=high", "--json")
    )
    decision = json.loads(told.out)["decision"]
    assert (decision["action"], decision["rule"], decision["type"]) == (
        "refuse",
        "*.high",
        "privacy",
    )


def test_chat_answers_one_question_and_remembers_a_conversation(
    psa: Psa, run_dir: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = psa("chat", picture, "--model", run_dir, "--text", "Hi", "--concept", "privacy=low")
    assert once.code == 0
    assert "hint by rule *.low" in once.out
    questions = iter(["What is this?", "And now?", ""])
    monkeypatch.setattr("typer.prompt", lambda *args, **kwargs: next(questions))
    talk = psa("chat", picture, "--model", run_dir, "--max-new-tokens", 8, "--json")
    assert talk.code == 0
    assert talk.out.count('"decision"') == 2


def test_assess_takes_a_shipped_policy_and_a_language(
    assess: Psa, picture: Path, tmp_path: Path
) -> None:
    high = (picture, "--text", "Hi", "--concept", "fairness=high", "--json", "--policy")
    assert json.loads(assess(*high, "strict").out)["decision"]["action"] == "refuse"
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: mine\ninherits: strict\nlanguages: {de: {refusal: Nein.}}\n")
    decision = json.loads(assess(*high, mine, "--language", "de").out)["decision"]
    assert decision["refusal"] == "Nein."
    assert decision["source"]["comment"] == "not left to the language model"
    shown = assess(picture, "--text", "Hi", "--concept", "fairness=high", "--policy", "strict")
    told = " ".join(shown.out.split())  # the terminal breaks long lines
    assert "refuse by rule *.high: fairness at level high" in told
    assert "policies/strict.yaml:10: not left to the language model)" in told


# --- policies ------------------------------------------------------------------------------------


def test_policy_check(psa: Psa, tmp_path: Path) -> None:
    fine = psa("policy", "check", "strict")
    assert (fine.code, fine.out) == (
        0,
        "strict: policy strict has an action for each of 18 cells\n",
    )
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: mine\ninherits: default\noff: [weather]\n")
    one_line(psa("policy", "check", mine), f"{mine}:3: off.weather: not a risk type; use one of")
    one_line(psa("policy", "check", "lax"), "lax: no such file", "strict")


def test_policy_check_takes_another_taxonomy(psa: Psa, tmp_path: Path) -> None:
    words = Taxonomy(types=("weather", "clean"), levels=("safe", "low"), clean="clean")
    words.to_yaml(tmp_path / "words.yaml")
    mine = tmp_path / "mine.yaml"
    texts = "hints: {low: Mind it.}\nrefusal: No.\nrefusal_error: No.\n"
    mine.write_text("name: mine\nrules: {weather: {low: hint}}\n" + texts)
    assert psa("policy", "check", mine).code == 2
    assert psa("policy", "check", mine, "--taxonomy", tmp_path / "words.yaml").code == 0


def test_policy_show(psa: Psa, tmp_path: Path) -> None:
    shown = psa("policy", "show", "captcha-allowed")
    assert shown.code == 0
    assert "allow (off)" in shown.out and "illegal risk" in shown.out
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: mine\ninherits: default\ntenants: {acme: {off: [privacy]}}\n")
    for tenant, rule in (([], "*.low"), (["--tenant", "acme"], "off.privacy")):
        told = json.loads(psa("policy", "show", mine, *tenant, "--json").out)
        cells = {(cell["type"], cell["level"]): cell["rule"] for cell in told["cells"]}
        assert cells["privacy", "low"] == rule
    one_line(psa("policy", "show", mine, "--tenant", "acne"), "no tenant 'acne'", "acme")


def test_policy_diff_ends_like_diff(psa: Psa) -> None:
    same = psa("policy", "diff", "strict", "strict")
    assert (same.code, same.out) == (0, "")
    told = psa("policy", "diff", "default", "captcha-allowed", "--json")
    assert told.code == 1
    assert json.loads(told.out)[0] == {"what": "privacy.low", "before": "hint", "after": "allow"}
    assert "privacy.low" in psa("policy", "diff", "default", "captcha-allowed").out
    assert psa("policy", "diff", "default", "lax").code == 2


def test_policy_schema(psa: Psa) -> None:
    assert "inherits" in json.loads(psa("policy", "schema").out)["properties"]


# --- bad input -----------------------------------------------------------------------------------


def test_missing_image(assess: Psa, tmp_path: Path) -> None:
    one_line(assess(tmp_path / "none.png", "--text", "Hi"), "none.png", "no such image")


def test_truncated_image(assess: Psa, tmp_path: Path) -> None:
    noise = Image.effect_noise((200, 200), 90)
    noise.save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    one_line(assess(tmp_path / "cut.png", "--text", "Hi"), "cut.png", "truncated")


def test_text_named_png(assess: Psa, tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("I am no picture")
    one_line(assess(tmp_path / "note.png", "--text", "Hi"), "note.png", "not an image")


def test_huge_png(assess: Psa, tmp_path: Path) -> None:
    (tmp_path / "huge.png").write_bytes(png_by_hand(30_000, 30_000, 8, 2, bytes(64)))
    one_line(assess(tmp_path / "huge.png", "--text", "Hi"), "huge.png", "pixels")


def test_animation_is_assessed_frame_by_frame(assess: Psa, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    told = json.loads(assess(tmp_path / "two.gif", "--text", "Hi", "--json").out)
    assert len(told["verdict"]["images"]) == 2


@pytest.mark.parametrize("text", ["", "  "])
def test_empty_text(assess: Psa, picture: Path, text: str) -> None:
    one_line(assess(picture, "--text", text), "text is empty")


def test_very_long_text(assess: Psa, picture: Path) -> None:
    one_line(assess(picture, "--text", "x" * 100_000), "100,000 tokens", "shorten")


@pytest.mark.parametrize(
    ("pair", "named"),
    [("privacy", "type=level"), ("weapons=high", "weapons"), ("privacy=extreme", "extreme")],
)
def test_bad_concept(assess: Psa, picture: Path, pair: str, named: str) -> None:
    one_line(assess(picture, "--text", "Hi", "--concept", pair), named)


def test_no_run_folder(psa: Psa, picture: Path, tmp_path: Path) -> None:
    outcome = psa("assess", picture, "--text", "Hi", "--model", tmp_path / "nowhere")
    one_line(outcome, "nowhere", "not a psa-vlm run", code=1)


def test_policy_with_an_unknown_key(assess: Psa, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("name: x\nrefuse_all: true\n")
    outcome = assess(picture, "--text", "Hi", "--policy", tmp_path / "policy.yaml")
    assert outcome.code == 2
    assert "unknown key 'refuse_all'" in outcome.err


def test_labels_outside_the_taxonomy_and_a_broken_line(
    psa: Psa, run_dir: Path, picture: Path, tmp_path: Path
) -> None:
    row = labelled(picture)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row) + "\n" + json.dumps({**row, "safe_type": 42}) + "\n")
    one_line(psa("evaluate", "--model", run_dir, "--data", data), "data.jsonl:2", "42")
    data.write_text(json.dumps(row) + "\n{broken\n")
    one_line(psa("evaluate", "--model", run_dir, "--data", data), "data.jsonl:2")
    data.write_text(json.dumps(row) + "\n")
    scored = json.loads(psa("evaluate", "--model", run_dir, "--data", data, "--json").out)
    assert scored["refused"]["high"]["n"] == 1
    assert scored["contamination"] is None
    shown = psa("evaluate", "--model", run_dir, "--data", data).out
    assert "contamination: unknown" in " ".join(shown.split())


def test_evaluate_tells_what_was_trained_on(
    psa: Psa, run: Path, picture: Path, tmp_path: Path
) -> None:
    from psa_vlm.data.contamination import Fingerprints
    from psa_vlm.data.readers import read

    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(labelled(picture)) + "\n")
    Fingerprints.of(read(data)).save(run)
    scored = json.loads(psa("evaluate", "--model", run, "--data", data, "--json").out)
    assert scored["contamination"]["images"] == scored["contamination"]["both"] == 1
    assert "1 share an image with training" in psa("evaluate", "--model", run, "--data", data).out


# --- data ----------------------------------------------------------------------------------------


def labelled(picture: Path, type: int = 1) -> dict[str, object]:
    """A row in the authors' layout."""
    words = [("USER", "<image>\nWhat is this?"), ("ASSISTANT", "No.")]
    return {
        "safe_type": type,
        "safe_level": 3,
        "image": str(picture),
        "conversations": [{"from": speaker, "value": text} for speaker, text in words],
    }


def test_data_inspect(psa: Psa, picture: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(labelled(picture)) + "\n")
    fine = psa("data", "inspect", data)
    assert fine.code == 0 and "illegal_risk" in fine.out
    data.write_text(data.read_text() + json.dumps(labelled(picture, type=42)) + "\n")
    bad = psa("data", "inspect", data)
    assert bad.code == 1 and f"{data}:2: type 42 is not in the taxonomy" in bad.out
    told = json.loads(psa("data", "inspect", data, "--json").out)
    assert told["samples"] == 1 and len(told["problems"]) == 1
    one_line(psa("data", "inspect", tmp_path / "none.json"), "none.json", "No such file")
    one_line(psa("data", "inspect", data, "--format", "nonsense"), "'nonsense' is unknown")


def test_data_prepare(psa: Psa, picture: Path, tmp_path: Path) -> None:
    data, config, out = tmp_path / "data.jsonl", tmp_path / "mix.yaml", tmp_path / "out"
    data.write_text(json.dumps(labelled(picture)) + "\n")
    config.write_text(f"sources: [{{path: {data}}}]\nsplits: {{train: 1.0}}\n")
    shown = psa("data", "prepare", config, out)
    assert shown.code == 0 and "dropped.jsonl" in shown.out
    one_line(psa("data", "prepare", config, out), "exists already")
    told = psa("data", "prepare", config, tmp_path / "two", "--set", "seed=3", "--json")
    assert json.loads(told.out)["splits"]["train"]["samples"] == 1
    one_line(psa("data", "prepare", config, tmp_path / "c", "--set", "mix=1"), "unknown key 'mix'")


def test_train_names_a_wrong_key_and_where(psa: Psa, tmp_path: Path) -> None:
    config = tmp_path / "stage1.yaml"
    config.write_text("backbone: x\nout: y\nepochs: 3\n")
    one_line(psa("train", "stage1", config), "stage1.yaml", "unknown key 'epochs'")
    one_line(psa("train", "stage2", tmp_path / "none.yaml"), "none.yaml")
    config.write_text("backbone: x\nout: y\n")
    one_line(psa("train", "stage1", config, "--set", "concepts.lr=1"), "lr")


def test_a_key_is_shown_once_and_kept_as_a_hash(psa: Psa, tmp_path: Path) -> None:
    from psa_vlm.serving.keys import Keys

    path = tmp_path / "keys.yaml"
    shown = [psa("keys", "add", path, name).out.strip() for name in ("school", "press", "school")]
    keys = Keys.load(path)
    assert [keys.tenant(key) for key in shown] == ["school", "press", "school"]
    assert not any(key in path.read_text() for key in shown)


def test_an_audit_log_is_verified_and_exported(psa: Psa, tmp_path: Path) -> None:
    import sqlite3

    from psa_vlm.serving.audit import Audit, Entry

    path = tmp_path / "audit.db"
    one_line(psa("audit", "verify", path), "no such audit log", code=1)
    log = Audit(f"sqlite:///{path}")
    named = {"name": "n", "hash": "0"}
    heads = [
        log.append(Entry(name, "chat", None, (), {}, None, {"action": "allow"}, named, named))
        for name in ("first", "second")
    ]
    log.close()
    assert json.loads(psa("audit", "verify", path, "--json").out) == {
        "records": 2,
        "head": heads[1],
    }
    assert psa("audit", "verify", path, "--head", heads[0]).code == 0
    one_line(psa("audit", "verify", path, "--head", "f" * 64), "no record has the hash", code=1)
    told = [json.loads(line) for line in psa("audit", "export", path).out.splitlines()]
    assert [one["request"] for one in told] == ["first", "second"]
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE records SET content = '{}' WHERE id = 2")
    connection.close()
    one_line(psa("audit", "verify", path), "record 2 was changed", code=1)
    broken = psa("audit", "export", path)
    assert (broken.code, len(broken.out.splitlines())) == (1, 1)


def test_an_exported_record_can_not_steer_a_terminal(psa: Psa, tmp_path: Path) -> None:
    from psa_vlm.serving.audit import Audit, Entry

    path, named = tmp_path / "audit.db", {"name": "n", "hash": "0"}
    reason = "no model '\x1b[2J\x9b2J\u202ex\n' here"  # clears the screen, turns the writing around
    log = Audit(f"sqlite:///{path}")
    why = {"code": "model_not_found", "status": 404, "reason": reason}
    log.append(Entry("one", "chat", None, (), {}, None, None, named, named, why))
    log.close()
    (line,) = psa("audit", "export", path).out.splitlines()
    assert line.isascii() and line.isprintable()
    assert json.loads(line)["error"]["reason"] == reason


def test_a_policy_is_replayed_on_an_audit_log(psa: Psa, tmp_path: Path) -> None:
    from psa_vlm.model.verdict import ImageVerdict, Verdict
    from psa_vlm.serving.audit import Audit, Entry

    words = Taxonomy.default()
    probs = [dict.fromkeys(names, 0.0) for names in (words.types, words.levels)]
    probs[0]["privacy"] = probs[1]["high"] = 1.0
    seen = Verdict.from_probs([ImageVerdict(*probs)], words).to_dict()
    decision = {"action": "refuse", "rule": "*.high", "type": "privacy", "level": "high"}
    named = {"name": "n", "hash": "0"}
    path = tmp_path / "audit.db"
    one_line(psa("policy", "replay", "strict", "--audit", path), "no such audit log", code=1)
    log = Audit(f"sqlite:///{path}")
    log.append(Entry("one", "chat", None, ("ab",), {"privacy": 1.0}, seen, decision, named, named))
    log.append(Entry("two", "chat", None, (), {}, None, None, named, named, {"code": "timeout"}))
    log.close()
    same = psa("policy", "replay", "strict", "--audit", path)
    assert same.code == 0 and "0 change, 1 stay" in same.out and "timeout" in same.out
    changed = psa("policy", "replay", "captcha-allowed", "--audit", path, "--json")
    assert changed.code == 1
    (change,) = json.loads(changed.out)["changes"]
    assert (change["count"], change["after"]["rule"]) == (1, "off.privacy")
    one_line(psa("policy", "replay", "none.yaml", "--audit", path), "no such file")


def test_serve_refuses_the_open_without_keys(psa: Psa, run_dir: Path) -> None:
    one_line(psa("serve", "--model", run_dir, "--host", "0.0.0.0"), "psa-vlm keys add")


# --- sharing -------------------------------------------------------------------------------------


def test_an_export_is_a_model_for_every_command(
    psa: Psa, run: Path, picture: Path, tmp_path: Path
) -> None:
    from psa_vlm.data.contamination import Fingerprints
    from psa_vlm.data.readers import read

    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text(json.dumps(labelled(picture)) + "\n")
    Fingerprints.of(read(data)).save(run)
    assert f"exported to {out}" in psa("export", run, out).out
    asked = (picture, "--text", "What is this?", "--json", "--model")
    told = [json.loads(psa("assess", *asked, model).out)["verdict"] for model in (run, out)]
    assert told[0] == told[1]
    scored = json.loads(psa("evaluate", "--model", out, "--data", data, "--json").out)
    assert scored["contamination"]["both"] == 1
    one_line(psa("export", run, out), f"{out}: exists already", "choose another folder")
    one_line(psa("export", data.parent, tmp_path / "new"), "not a psa-vlm run", code=1)
    gone = psa("export", run, tmp_path / "new", "--base", tmp_path / "gone")
    one_line(gone, "gone", "give its new place", code=1)


def test_the_authors_checkpoint_becomes_a_run(
    psa: Psa, llava_dir: Path, picture: Path, tmp_path: Path
) -> None:
    state = Path(__file__).parent / "data" / "parity" / "official_tiny.safetensors"
    run, base = tmp_path / "run", ("--base", llava_dir)
    assert f"imported to {run}" in psa("import-official", state, run, *base).out
    told = psa("assess", picture, "--text", "What is this?", "--json", "--model", run)
    assert json.loads(told.out)["verdict"]["error"] is None
    one_line(psa("import-official", state, run, *base), "exists already")
    none = psa("import-official", tmp_path / "none.bin", tmp_path / "new", *base)
    one_line(none, "none.bin", "No such file", code=1)
    Taxonomy(("weapons", "clean"), ("safe", "high"), "clean").to_yaml(tmp_path / "few.yaml")
    few = ("--taxonomy", tmp_path / "few.yaml")
    one_line(psa("import-official", state, tmp_path / "new", *base, *few), "7 types", "names 2")


def test_what_is_no_run_is_not_pushed(psa: Psa, tmp_path: Path) -> None:
    one_line(psa("push", tmp_path, "me/mine"), "not a psa-vlm run", code=1)
