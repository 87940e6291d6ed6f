"""Pieces of an answer, for decoders that change their minds about what they wrote."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from psa_vlm.model.writing import heard, written

END = 0


class Decoder:
    """Decodes ids by a function of their words."""

    def __init__(self, words: Sequence[bytes], cleanup: tuple[str, str] = ("", "")) -> None:
        self.words = words
        self.cleanup = cleanup

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        text = b"".join(self.words[id_] for id_ in ids if id_ != END).decode(errors="replace")
        return text.replace(*self.cleanup) if self.cleanup[0] else text

    def batch_decode(self, rows: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in rows.tolist()]


class Ears:
    def __init__(self, rows: int) -> None:
        self.heard: list[list[str]] = [[] for _ in range(rows)]

    def wrote(self, row: int, piece: str) -> None:
        self.heard[row].append(piece)

    def left(self, row: int) -> bool:
        return row == 1


def pieces(decoder: Decoder, *steps: Sequence[int]) -> list[list[str]]:
    ears = Ears(len(steps[0]))
    streamer = heard(ears, decoder, frozenset({END}))["streamer"]
    streamer.put(torch.zeros(len(steps[0]), 9, dtype=torch.long))  # the prompts
    for step in steps:
        streamer.put(torch.tensor(step))
    streamer.end()
    return ears.heard


def test_half_a_character_waits_for_its_other_half() -> None:
    words = [b"", "\u65e5".encode()[:2], "\u65e5".encode()[2:], "\u672c".encode(), b" \n"]
    assert pieces(Decoder(words), [1], [2], [3], [4]) == [["\u65e5", "\u672c"]]


def test_a_word_waits_for_what_a_decoder_may_join_to_it() -> None:
    decoder = Decoder([b"", b" I", b" don", b" '", b" t", b" know"], (" ' ", "'"))
    (row,) = pieces(decoder, [1], [2], [3], [4], [5], [END])
    assert "".join(row) == "I don't know" and len(row) > 2


def test_what_follows_an_end_is_not_heard() -> None:
    decoder = Decoder([b"", b"a ", b"b "])
    assert pieces(decoder, [1, 2], [END, 1], [2, 1]) == [["a"], ["b", " a", " a"]]


@pytest.mark.parametrize(
    ("ids", "tokens", "cut", "text"),
    [([1, 2, 2], 3, True, "a b b"), ([1, END, END], 2, False, "a"), ([END, 1, 1], 1, False, "")],
)
def test_an_answer_counts_its_end_and_not_its_padding(
    ids: list[int], tokens: int, cut: bool, text: str
) -> None:
    (one,) = written(torch.tensor([ids]), [7], Decoder([b"", b"a ", b"b "]), frozenset({END}))
    assert (one.read, one.tokens, one.cut) == (7, tokens, cut)
    assert one.text.startswith(text)


def test_only_those_who_left_are_written_no_further() -> None:
    criteria = heard(Ears(3), None, frozenset())["stopping_criteria"]
    assert criteria(torch.zeros(3, 2, dtype=torch.long), None).tolist() == [False, True, False]
