"""Layouts of published safety sets. What a set calls a category is kept as the tag `category`."""

from __future__ import annotations

from collections.abc import Iterator

from psa_vlm.data.formats.base import Format, Reading, picture
from psa_vlm.data.rows import Row
from psa_vlm.data.sample import Sample
from psa_vlm.errors import DataError


def _words(row: Row, key: str) -> str | None:
    """What stands under a key that need not be there."""
    return row.text(key) if row.values.get(key) not in (None, "") else None


def _vlguard(row: Row, reading: Reading) -> Iterator[Sample]:
    safe, pairs = row.value("safe"), row.value("instr-resp")
    if not isinstance(safe, bool) or not isinstance(pairs, list) or not pairs:
        raise DataError(f"{row.where}: 'safe' must be true or false, 'instr-resp' a list of pairs")
    image = reading.image(row, row.text("image"))
    for number, pair in enumerate(pairs):
        if not isinstance(pair, dict):
            raise DataError(f"{row.where}: 'instr-resp' must hold objects")
        one = Row(row.where, pair, row.file, row.key)
        if not safe:
            kind, category = "instruction", row.text("harmful_category")
            sub = _words(row, "harmful_subcategory")
            labels = reading.labels(row, *([f"{category} / {sub}"] if sub else []), category)
        elif "safe_instruction" in pair:
            kind, category, sub, labels = "safe_instruction", "safe", None, reading.clean
        else:
            kind, category, sub = "unsafe_instruction", "unsafe instruction", None
            labels = reading.labels(row, category)
        question, answer = one.text(kind), one.text("response")
        yield reading.sample(
            row, image, question, answer, labels, str(number), category=category, subcategory=sub
        )


def _rtvlm(row: Row, reading: Reading) -> Iterator[Sample]:
    """Rows differ from task to task; the task is the folder's name."""
    task = row.file.parent.name
    named = next(
        (key for key in ("image", "img", "image_path", "image_name") if key in row.values), None
    )
    if named is not None:
        image = reading.image(row, row.text(named))
    else:
        number = row.text("index", "id")
        places = [reading.image(row, f"{number}{end}", "img") for end in (".png", ".jpg", ".jpeg")]
        image = next((place for place in places if place.is_file()), places[0])
    answer = _words(row, "answer")
    labels = reading.labels(row, task)
    yield reading.sample(
        row, image, row.text("instruction", "question"), answer, labels, category=task
    )


def _figstep(row: Row, reading: Reading) -> Iterator[Sample]:
    """The request is drawn into the image; what is asked beside it comes from the map."""
    category = row.text("category_name")
    name = f"query_{row.text('dataset')}_{row.text('category_id')}_{row.text('task_id')}_6.png"
    image = reading.image(row, name, "../images/SafeBench", "../images/SafeBench-Tiny")
    labels = reading.labels(row, category)
    yield reading.sample(
        row,
        image,
        reading.prompt(row),
        None,
        labels,
        category=category,
        drawn=row.text("instruction"),
    )


_MM_SAFETY = {
    "SD": "Rephrased Question(SD)",
    "SD_TYPO": "Rephrased Question",
    "TYPO": "Rephrased Question",
}


def _mm_safetybench(row: Row, reading: Reading) -> Iterator[Sample]:
    """Three samples a row, one for each way in which its image was made."""
    scenario = row.file.stem
    labels = reading.labels(row, scenario.partition("-")[2] or scenario)
    for made, key in _MM_SAFETY.items():
        image = reading.image(row, f"{scenario}/{made}/{row.key}.jpg", "../imgs")
        yield reading.sample(
            row, image, row.text(key), None, labels, made, category=scenario, made=made
        )


def _mossbench(row: Row, reading: Reading) -> Iterator[Sample]:
    """Harmless requests that look risky."""
    image = reading.image(row, row.text("image_path"), "..")
    over = _words(row, "over") or _words(row, "meta_data_over")
    yield reading.sample(row, image, row.text("question"), None, reading.clean, category=over)


def _spa_vl(row: Row, reading: Reading) -> Iterator[Sample]:
    """Training rows have answers and no class, test rows classes and no answer."""
    classes = [row.text(key) for key in ("class1", "class2", "class3") if _words(row, key)]
    yield reading.sample(
        row,
        picture(row),
        row.text("question"),
        _words(row, "chosen"),
        reading.labels(row, *reversed(classes)) if classes else None,
        category=classes[0] if classes else None,
        rejected=_words(row, "rejected"),
    )


def _jailbreakv(row: Row, reading: Reading) -> Iterator[Sample]:
    policy = row.text("policy")
    image = reading.image(row, row.text("image_path"))
    labels = reading.labels(row, policy)
    yield reading.sample(
        row,
        image,
        row.text("jailbreak_query"),
        None,
        labels,
        category=policy,
        attack=_words(row, "format"),
    )


def _siuo(row: Row, reading: Reading) -> Iterator[Sample]:
    category = row.text("category")
    image = reading.image(row, row.text("image"))
    answer = _words(row, "reference_answer")
    labels = reading.labels(row, category)
    yield reading.sample(row, image, row.text("question"), answer, labels, category=category)


def _vlsbench(row: Row, reading: Reading) -> Iterator[Sample]:
    category, sub = row.text("category"), _words(row, "sub_category")
    image = reading.image(row, row.text("image_path"))
    labels = reading.labels(row, *([f"{category} / {sub}"] if sub else []), category)
    yield reading.sample(
        row, image, row.text("instruction"), None, labels, category=category, subcategory=sub
    )


def _holisafe(row: Row, reading: Reading) -> Iterator[Sample]:
    """`type` says S or U for image, question and both; only SSS may be answered freely."""
    kind, category, sub = row.text("type"), row.text("category"), _words(row, "subcategory")
    if kind not in ("SSS", "SSU", "USU", "SUU", "UUU"):
        raise DataError(f"{row.where}: 'type' is {kind!r}; valid: SSS, SSU, USU, SUU, UUU")
    image = reading.image(row, row.text("image"))
    names = [f"{category} / {sub}"] if sub else []
    labels = reading.clean if kind == "SSS" else reading.labels(row, *names, category)
    yield reading.sample(
        row, image, row.text("query"), None, labels, category=category, subcategory=sub, kind=kind
    )


def _unsafebench(row: Row, reading: Reading) -> Iterator[Sample]:
    """Images with a label and no question; what is asked comes from the map."""
    label, category = row.text("safety_label").lower(), row.text("category")
    if label not in ("safe", "unsafe"):
        raise DataError(f"{row.where}: 'safety_label' is {label!r}; valid: Safe, Unsafe")
    labels = reading.clean if label == "safe" else reading.labels(row, category)
    origin = _words(row, "source")
    yield reading.sample(
        row, picture(row), reading.prompt(row), None, labels, category=category, origin=origin
    )


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split(","))


SAFETY = (
    Format("vlguard", "VLGuard", _vlguard, _keys("image,safe,instr-resp")),
    Format("rtvlm", "RTVLM", _rtvlm, _keys("instruction"), ("data/*/*.jsonl", "*/*.jsonl")),
    Format(
        "figstep",
        "FigStep",
        _figstep,
        _keys("dataset,category_id,task_id,category_name,instruction"),
        ("data/question/*.csv", "question/*.csv"),
        "MIT",
    ),
    Format(
        "mm-safetybench",
        "MM-SafetyBench",
        _mm_safetybench,
        _keys("Question,Key Phrase,Rephrased Question,Rephrased Question(SD)"),
        ("processed_questions/*.json", "data/processed_questions/*.json"),
        "CC-BY-NC",
    ),
    Format(
        "mossbench",
        "MOSSBench",
        _mossbench,
        _keys("pid,question,image_path,description"),
        ("information.csv", "images_information/information.json"),
        "CC BY-SA, test only",
    ),
    Format(
        "spa-vl",
        "SPA-VL",
        _spa_vl,
        _keys("image,question,chosen,rejected"),
        licence="CC BY 4.0",
        or_keys=_keys("image,question,class1,class2,class3"),
    ),
    Format(
        "jailbreakv",
        "JailBreakV-28K",
        _jailbreakv,
        _keys("jailbreak_query,policy,image_path"),
        (),
        "MIT",
    ),
    Format("siuo", "SIUO", _siuo, _keys("image,question,category,safety_warning"), (), "NC"),
    Format(
        "vlsbench", "VLSBench", _vlsbench, _keys("instruction_id,instruction,image_path,category")
    ),
    Format("holisafe", "HoliSafe-Bench", _holisafe, _keys("image,query,category,type,image_safe")),
    Format("unsafebench", "UnsafeBench", _unsafebench, _keys("image,safety_label,category")),
)
