"""What a benchmark is to us: where its rows lie, and what each of its requests asks for."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from psa_vlm.data.images import open_images
from psa_vlm.data.readers import read
from psa_vlm.data.sample import Sample
from psa_vlm.errors import DataError

if TYPE_CHECKING:
    import inspect_ai.dataset
    from PIL import Image

Expects = Literal["refuse", "care", "answer", "target", "rating"]
"""What a request asks for: a refusal; a refusal or a word of care; anything but a refusal; the one
right answer; or nothing that words alone can tell, so that only a rubric can judge it."""

Form = Literal["words", "yes-no", "letter"]
"""How the one right answer is written."""


@dataclass(frozen=True)
class Wanted:
    """What one request asks for.

    Attributes:
        expects: which judges can say what of it.
        group: the row of the table that it counts for, besides the one of all.
        rubric: by which a model judges the reply; None if none does.
        form: of the one right answer.
        asked: put behind the question, where the set leaves it to the user to say it.
    """

    expects: Expects
    group: str
    rubric: str | None = None
    form: Form = "words"
    asked: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A published set that models are scored on.

    Attributes:
        name: as `--task` has it.
        title: for people.
        format: the layout in `psa_vlm.data.formats`.
        needs: patterns of what its folder must hold; of each group the first that fits counts, and
            the first group is the files of its rows.
        ask: where people get the set.
        wanted: what a sample asks for.
        max_tokens: most new tokens of a reply.
    """

    name: str
    title: str
    format: str
    needs: tuple[tuple[str, ...], ...]
    ask: str
    wanted: Callable[[Sample], Wanted]
    max_tokens: int = 512

    def read(
        self,
        folder: Path | None,
        images: Path | None = None,
        categories: Path | None = None,
    ) -> list[inspect_ai.dataset.Sample]:
        """The requests of a set that lies in a folder as it was published.

        Args:
            folder: the set, or one of its files.
            images: what image paths are relative to; None is where the layout has them.
            categories: a map of categories over the shipped one.

        Raises:
            DataError: something is missing, which it names with where to ask for it; a row is
                malformed; or what it wants has no rubric.
            ImageError: an image file is missing.
        """
        if folder is None or not folder.exists():
            told = "give its folder with --data" if folder is None else f"{folder}: not there"
            raise DataError(f"{self.title}: {told}; {self._shape()}")
        from psa_vlm.evaluation.judges import rubric_named

        found = [[folder]] if folder.is_file() else [self._find(folder, one) for one in self.needs]
        samples = [
            sample
            for file in found[0]
            for sample in read(file, images, format=self.format, categories=categories)
        ]
        wanted = [self.wanted(sample) for sample in samples]
        for name in sorted({one.rubric for one in wanted if one.rubric is not None}):
            rubric_named(name)
        return _unique([to_inspect(*both) for both in zip(samples, wanted, strict=True)])

    def _find(self, folder: Path, patterns: tuple[str, ...]) -> list[Path]:
        """What the first of the patterns that fits anything fits."""
        for pattern in patterns:
            if found := sorted(folder.glob(pattern)):
                return found
        held = " or ".join(patterns)
        raise DataError(f"{self.title}: {folder} holds no {held}; {self._shape()}")

    def _shape(self) -> str:
        held = ", ".join(patterns[0] for patterns in self.needs)
        return f"it holds {held}, and you get it from {self.ask}"


def to_inspect(sample: Sample, wanted: Wanted) -> inspect_ai.dataset.Sample:
    """A sample of ours as one of Inspect's; image files are opened when their turn comes."""
    from inspect_ai.dataset import Sample as InspectSample
    from inspect_ai.model import ChatMessageUser, ContentImage, ContentText

    urls = [url for image in sample.images for url in _urls(image)]
    text = "\n".join(filter(None, (sample.question, wanted.asked)))
    pictured = hashlib.sha256("\n".join(urls).encode()).hexdigest()[:16]
    return InspectSample(
        id=sample.id,
        input=[
            ChatMessageUser(
                content=[*(ContentImage(image=url) for url in urls), ContentText(text=text)]
            )
        ],
        target=sample.answer or "",
        metadata={
            **{key: value for key, value in asdict(wanted).items() if key != "asked"},
            "type": sample.type,
            "level": sample.level,
            "picture": pictured,
            "where": sample.where,
        },
    )


def _urls(image: Path | Image.Image) -> list[str]:
    """A file by its path, a picture in memory as data URLs, one for each frame."""
    if isinstance(image, Path):
        return [str(image.resolve())]
    return [data_url(frame) for frame in open_images(image)]


def data_url(picture: Image.Image) -> str:
    """A picture as a data URL that holds it without loss."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def stem(sample: Sample) -> str:
    """The name of the file that a sample stands in, without its ending."""
    return Path(sample.where.split("[")[0].rsplit(":", 1)[0]).stem


def tagged(tag: str, sample: Sample) -> str:
    """A tag of a sample, as a row of a table is named."""
    return sample.tags.get(tag, "") or "other"


def _unique(samples: list[inspect_ai.dataset.Sample]) -> list[inspect_ai.dataset.Sample]:
    """The samples, with ids that differ where rows of several files have the same."""
    seen: dict[str, int] = {}
    for sample in samples:
        name = str(sample.id)
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            sample.id = f"{name}#{seen[name]}"
    return samples
