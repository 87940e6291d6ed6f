"""Safety tokens (2) in vocabulary and chat template, and user text that can't forge structure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from unicodedata import category, normalize
from weakref import WeakKeyDictionary

import torch
from jinja2 import TemplateError

from psa_vlm.errors import CheckpointError, ConfigError, InputError

if TYPE_CHECKING:
    from psa_vlm.model.backbone import Backbone

BREAKS = ("\u200b", "\u2060", "\u00b7", " ")
"""What may be put inside a forged mark, the least visible first; a tokenizer may drop some."""
REMEMBERED = 32
"""Texts of which a guard remembers the outcome: verdict and prompt ask for the same one."""
_INVISIBLE = {"Cc", "Cf", "Mn", "Me", "Zs", "Zl", "Zp"}
_SEAM = "\0"
"""Stands for a special token where the text around it is looked at."""
_SENTINELS = ("qzaqz", "qzbqz", "qzcqz", "qzdqz")


# --- the vocabulary entries ----------------------------------------------------------------------


def image_mark(processor: Any) -> str:
    """What stands for an image, or for one of its positions, in the text of a prompt."""
    return str(processor.image_token)  # some processors hold it as a token of their tokenizer


def safety_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the safety tokens (2) in a tokenizer, in order; empty if it has none."""
    vocabulary = tokenizer.get_added_vocab()
    names: Iterator[str] = (f"<safety_{i}>" for i in range(len(vocabulary)))
    return tuple(vocabulary[name] for name in names if name in vocabulary)


def add_safety_tokens(backbone: Backbone, count: int = 64, seed: int = 0) -> tuple[int, ...]:
    """Give a backbone ``count`` safety tokens (2) before every image of its prompts.

    Adds the vocabulary entries ``<safety_0>``, ..., with embedding rows drawn from N(0, 0.02),
    keeps every other row as it is, rewrites the chat template, and forbids their generation. A
    backbone that has the same number already is left alone.

    Args:
        backbone: changed in place.
        count: number of tokens (64 in the paper), at least 1.
        seed: of the new rows.

    Returns:
        The token ids, in prompt order.

    Raises:
        ConfigError: if ``count`` is below 1, or the backbone has another number of them already.
        CheckpointError: if the chat template does not write its image mark literally.
        NoLanguageModel: the backbone is a dual encoder.
    """
    backbone.check_writes("a safety token")
    if count < 1:
        raise ConfigError(f"{count} safety tokens asked for: give a number of 1 or more")
    model, processor, tokenizer = backbone.model, backbone.processor, backbone.tokenizer
    present = safety_token_ids(tokenizer)
    if present and len(present) != count:
        raise ConfigError(
            f"the backbone has {len(present)} safety tokens already: ask for that many, not {count}"
        )
    names = [f"<safety_{i}>" for i in range(count)]
    processor.chat_template = _with_tokens(processor, processor.chat_template, names)
    if present:
        return present
    tokenizer.add_tokens(names, special_tokens=True)
    if tokenizer.chat_template is not None:
        tokenizer.chat_template = processor.chat_template
    ids = safety_token_ids(tokenizer)
    _add_rows(model, ids, seed)
    suppressed = {*(model.generation_config.suppress_tokens or ()), *ids, backbone.image_token_id}
    model.generation_config.suppress_tokens = sorted(suppressed)
    return ids


@torch.no_grad()
def put_rows(backbone: Backbone, rows: torch.Tensor) -> None:
    """Give a backbone as many safety tokens (2) as there are rows, with these as embeddings.

    Args:
        backbone: changed in place.
        rows: ``[K, D]``.

    Raises:
        ConfigError, CheckpointError: as :func:`add_safety_tokens`.
    """
    ids = add_safety_tokens(backbone, len(rows))
    weight = backbone.model.get_input_embeddings().weight
    weight[list(ids)] = rows.to(weight)


def get_rows(backbone: Backbone) -> torch.Tensor:
    """The embeddings of the safety tokens (2) ``[K, D]``; none before they are added."""
    ids = list(backbone.safety_token_ids)
    if not ids:
        return torch.empty(0, backbone.text_width)
    rows: torch.Tensor = backbone.model.get_input_embeddings().weight[ids]
    return rows


def plain_template(backbone: Backbone) -> str:
    """The chat template, safety tokens included, for the backbone's processor used by itself."""
    own: str = backbone.processor.chat_template
    if backbone.spec.plain_template is None:
        return own
    names = backbone.tokenizer.convert_ids_to_tokens(list(backbone.safety_token_ids))
    return _with_tokens(backbone.processor, backbone.spec.plain_template, names)


def _with_tokens(processor: Any, template: str, names: Sequence[str]) -> str:
    """A chat template with these tokens before each image mark, checked on two images."""
    mark, tokens = image_mark(processor), "".join(names)
    if tokens + mark not in template:
        template = template.replace(mark, tokens + mark)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": _SENTINELS[0]}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, tokenize=False
    )
    if text.count(tokens + mark) != 2 or text.count(mark) != 2:
        raise CheckpointError(
            f"the chat template must write {mark} literally, once for each image, "
            "so that the safety tokens can stand before it: change its image part"
        )
    return template


@torch.no_grad()
def _add_rows(model: Any, ids: Sequence[int], seed: int) -> None:
    """Embedding rows for ``ids``, drawn as large as those of words.

    A checkpoint may have spare rows, which are then used.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    used = min(ids)
    average = None if head is None else head.weight[:used].float().mean(0)
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(
            max(len(embeddings.weight), max(ids) + 1), mean_resizing=False
        )
    rows = model.get_input_embeddings().weight
    drawn = torch.randn(len(ids), rows.shape[1], generator=torch.Generator().manual_seed(seed))
    rows[list(ids)] = (drawn * rows[:used].float().std()).to(rows)
    if average is not None and not tied:  # never generated: an unremarkable score will do
        head = model.get_output_embeddings()
        head.weight[list(ids)] = average.to(head.weight)


# --- user text stays text ------------------------------------------------------------------------


def neutralise(text: str, processor: Any) -> str:
    """User text in which no special token and no role mark is left: see :class:`Guard`."""
    return guard_of(processor).clean(text)


def guard_of(processor: Any) -> Guard:
    """The guard of a processor, built once for each state of its vocabulary and template."""
    state = (len(processor.tokenizer), processor.chat_template)
    known = _guards.get(processor)
    if known is None or known[0] != state:
        known = _guards[processor] = (state, Guard(processor))
    return known[1]


class Guard:
    """Makes the structure of prompts unforgeable by user text.

    Structure is every special token, every added token that looks like a mark, and every role
    mark that the chat template writes in plain text ("USER:"). A mark is recognised through the
    disguises that a tokenizer's normaliser may undo: case, compatibility forms, accents,
    invisible characters and white space. A break goes behind its first character. Whether that
    was enough is then read off the token ids, and a stronger break tried if not.

    Attributes:
        structural: ids that only the chat template may write.
        marks: the strings behind them, and the plain-text role marks.
        role_ids: the role marks as token ids, in every way that they are spelled.
        safety_ids: the safety tokens (2), in prompt order.
    """

    def __init__(self, processor: Any) -> None:
        self.tokenizer = processor.tokenizer
        added = {
            id_: token.content
            for id_, token in self.tokenizer.added_tokens_decoder.items()
            if token.special or _looks_like_mark(token.content)
        }
        roles = role_marks(processor, added.values())
        unknown = self.tokenizer.unk_token_id
        self.structural = frozenset(added) - {unknown}
        self.marks = (*added.values(), *roles)
        folded = sorted({_fold(mark)[0] for mark in self.marks} - {""}, key=len, reverse=True)
        starts = "".join(re.escape(start) for start in sorted({mark[0] for mark in folded}))
        marks = "|".join(map(re.escape, folded))
        self._pattern = re.compile(f"(?=[{starts}])(?=({marks}))" if folded else r"(?!)")
        spelled = {ids for mark in roles for ids in self._spellings(mark)}
        self.role_ids = [ids for ids in spelled if ids and unknown not in ids]
        self.safety_ids = safety_token_ids(self.tokenizer)
        self._plain = lru_cache(REMEMBERED)(self._make_plain)

    def clean(self, text: str) -> str:
        """The text with every mark broken.

        Raises:
            InputError: if a mark cannot be broken for this tokenizer.
        """
        return self._plain(text)[0]

    def clean_ids(self, text: str) -> list[int]:
        """Token ids of the cleaned text alone, without a begin mark.

        Raises:
            InputError: as `clean`.
        """
        return list(self._plain(text)[1])

    def structure(self, ids: Iterable[int]) -> Counter[int]:
        """How often each structural id stands among ``ids``."""
        return Counter(id_ for id_ in ids if id_ in self.structural)

    def _make_plain(self, text: str) -> tuple[str, tuple[int, ...]]:
        """A text with every mark broken, and its ids."""
        places = self._places(text)
        for break_ in BREAKS:
            cleaned = _broken(text, places, break_)
            ids = self._ids(cleaned)
            if self._is_plain(ids):
                return cleaned, tuple(ids)
        raise InputError("the text imitates control tokens and can't be made plain: remove them")

    def _places(self, text: str) -> dict[int, bool]:
        """Where to break: character index -> whether that one character is the whole mark."""
        folded, origin = _fold(text)
        return {
            origin[match.start()]: origin[match.start()] == origin[match.end(1) - 1]
            for match in self._pattern.finditer(folded)
        }

    def _is_plain(self, ids: Sequence[int]) -> bool:
        spelled = _as_text(ids)
        forges = any(_as_text(role) in spelled for role in self.role_ids)
        return not forges and self.structural.isdisjoint(ids)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _spellings(self, mark: str) -> Iterator[tuple[int, ...]]:
        """Token ids of a mark alone, and after a word, a space or a line break."""
        for before in ("", "a", "a ", "a\n"):
            start, whole = self._ids(before), self._ids(before + mark)
            if whole[: len(start)] == start:
                yield tuple(whole[len(start) :])


_guards: WeakKeyDictionary[Any, tuple[tuple[int, str], Guard]] = WeakKeyDictionary()


def role_marks(processor: Any, specials: Iterable[str]) -> tuple[str, ...]:
    """What the chat template writes in plain text before a user's, assistant's or system's words.

    Read off a rendered conversation of sentinels. A bare word beside a special token ("user" in
    "<|im_start|>user") is no mark: without the token, which can't be forged, it is only a word.
    """
    special = re.compile("|".join(map(re.escape, specials)) or r"(?!)")

    def pieces(*roles: str) -> list[str]:
        return [special.sub(_SEAM, piece) for piece in _pieces(processor, roles)]

    user1, assistant1, user2, assistant2, _ = pieces("user", "assistant", "user", "assistant")
    headers = [_common_suffix(user1, user2), _common_suffix(assistant1, assistant2)]
    with suppress(TemplateError, CheckpointError):  # a template may refuse or drop system turns
        headers.append(pieces("system", "user")[0])
    parts = {part.strip() for header in headers for part in header.split(_SEAM)}
    return tuple(sorted(filter(_looks_like_mark, parts)))


def _pieces(processor: Any, roles: Sequence[str]) -> list[str]:
    """What the template writes before, between and after the texts of these turns."""
    turns = [
        {"role": role, "content": [{"type": "text", "text": sentinel}]}
        for role, sentinel in zip(roles, _SENTINELS, strict=False)
    ]
    text = processor.apply_chat_template(turns, tokenize=False)
    pieces = re.split("|".join(_SENTINELS), text)
    if len(pieces) != len(roles) + 1:
        raise CheckpointError("the chat template does not write each turn's text exactly once")
    return pieces


def _common_suffix(a: str, b: str) -> str:
    same = [x == y for x, y in zip(reversed(a), reversed(b), strict=False)]
    length = [*same, False].index(False)
    return a[len(a) - length :]


def _looks_like_mark(text: str) -> bool:
    return re.search(r"[^\w\s]", text) is not None


def _fold(text: str) -> tuple[str, list[int]]:
    """Text without disguises, and for each of its characters the index it came from."""
    folded = [(char, i) for i, original in enumerate(text) for char in _plain(original)]
    return "".join(char for char, _ in folded), [i for _, i in folded]


@lru_cache(maxsize=1 << 16)
def _plain(char: str) -> str:
    parts = normalize("NFKD", normalize("NFKD", char).casefold())
    return "".join(part for part in parts if category(part) not in _INVISIBLE)


def _broken(text: str, places: dict[int, bool], break_: str) -> str:
    if not places:
        return text
    parts = []
    for i, char in enumerate(text):
        if i not in places or text[i + 1 : i + 2] == break_:
            parts.append(char)
        else:
            parts.append(break_ if places[i] else char + break_)
    return "".join(parts)


def _as_text(ids: Iterable[int]) -> str:
    """Ids as characters: searching one sequence in another is then a search in a string."""
    return "".join(map(chr, ids))
