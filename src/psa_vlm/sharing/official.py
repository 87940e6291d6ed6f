"""The authors' checkpoints as our runs."""

from __future__ import annotations

from pathlib import Path

from psa_vlm.errors import CheckpointError, ConfigError
from psa_vlm.inference import PsaVlm
from psa_vlm.model import official
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.bottleneck import BottleneckConfig, SafetyBottleneck
from psa_vlm.model.checkpoint import check_free
from psa_vlm.model.tokens import put_rows
from psa_vlm.sharing import provenance
from psa_vlm.sharing.card import write_card
from psa_vlm.taxonomy import Taxonomy


def import_official(state: Path, out: Path, base: str, taxonomy: Taxonomy | None = None) -> PsaVlm:
    """Turn a checkpoint of the authors' research code into a run folder.

    Args:
        state: file of tensors under their names; see `psa_vlm.model.official.read`.
        out: the run folder; it must not exist.
        base: folder or hub id of the vision-language model that it was trained on. A language
            model that they trained too must be in it.
        taxonomy: names of its types and levels, in the order of its label ids; None means the
            paper's.

    Raises:
        ConfigError: `out` exists, or the taxonomy has another number of types or levels.
        CheckpointError: a tensor is missing, unknown or of a size that does not fit the base model;
            a file can't be read, or the folder can't be written.
    """
    check_free(out)
    words = taxonomy or Taxonomy.default()
    tensors = official.read(state)
    try:
        bottleneck = SafetyBottleneck.from_official(tensors)
        rows = official.official_prompt_tokens(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{state}: {error}") from error
    _check_words(state, bottleneck.config, words)
    backbone = Backbone.from_pretrained(base)
    _check_widths(state, bottleneck.config, rows.shape[-1], backbone)
    put_rows(backbone, rows)
    model = PsaVlm(backbone, bottleneck, words)
    model.save_pretrained(out, lambda folder: _document(folder, state))
    return model


def _check_words(state: Path, config: BottleneckConfig, words: Taxonomy) -> None:
    for kind, held, named in (
        ("types", config.types, words.types),
        ("levels", config.levels, words.levels),
    ):
        if held != len(named):
            raise ConfigError(
                f"{state}: tells {held} {kind} apart, but the taxonomy names {len(named)}"
                f" ({', '.join(named)}); give a taxonomy file with a name for each"
            )


def _check_widths(state: Path, config: BottleneckConfig, rows: int, backbone: Backbone) -> None:
    for what, held, wanted in (
        ("vision features", config.vision_width, backbone.vision_width),
        ("text embeddings", config.text_width, backbone.text_width),
        (official.TOKENS_2, rows, backbone.text_width),
    ):
        if held != wanted:
            raise CheckpointError(
                f"{state}: was made for {what} of width {held}, but those of {backbone.source} are"
                f" {wanted} wide; give the base model that it was trained on"
            )


def _document(folder: Path, state: Path) -> None:
    note = (
        f"Imported from `{state.name}`, a checkpoint of the authors' research code; what it was"
        " trained on is not known here."
    )
    provenance.save(folder, {**provenance.load(folder), "note": note})
    write_card(folder)
