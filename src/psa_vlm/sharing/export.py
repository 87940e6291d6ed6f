"""A run as a folder for others: a plain checkpoint with its card, and on the Hub if wanted."""

from __future__ import annotations

import shutil
from pathlib import Path

from psa_vlm.data.contamination import FILE as SEEN
from psa_vlm.errors import CheckpointError
from psa_vlm.inference import PsaVlm
from psa_vlm.model.checkpoint import check_free, home, read_manifest
from psa_vlm.sharing import provenance
from psa_vlm.sharing.card import SCORECARD, write_card

RECORDS = (provenance.RECORD, provenance.HISTORY, SEEN, SCORECARD)


def export_run(run: Path, out: Path, base: Path | None = None) -> None:
    """Write a run as a plain Hugging Face checkpoint that holds all of it.

    Args:
        run: the run folder; its records and a scorecard go along.
        out: the folder; it must not exist.
        base: where the base model is now, if it moved.

    Raises:
        ConfigError: `out` exists.
        CheckpointError: the run can't be read, or the folder can't be written.
        PolicyError: the run's policy is malformed.
    """
    check_free(out)  # before anything large is loaded
    PsaVlm.from_pretrained(run, base).save_pretrained(
        out, lambda inside: _ride_along(run, inside), merged=True
    )


def _ride_along(run: Path, inside: Path) -> None:
    """Copy the records of a run, and nothing else that may lie in it, and write the card."""
    for name in RECORDS:
        if (home(run) / name).is_file():
            shutil.copy(home(run) / name, inside)
    provenance.save(inside, provenance.load(run))
    write_card(inside.parent)


def push(folder: Path, repo_id: str) -> str:
    """Put a run folder, exported or not, on the Hub, as one commit of a model repository.

    Args:
        folder: the run.
        repo_id: as in `owner/name`; made as a private one if it is not there.

    Returns:
        Where it is now.

    Raises:
        CheckpointError: it is not a run, or the Hub did not take it.
    """
    read_manifest(folder)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    api = HfApi(library_name="psa-vlm")
    try:
        api.create_repo(repo_id, private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload with psa-vlm"
        )
    except (OSError, ValueError, HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{repo_id}: can't push {folder} ({reason}); is the name right, and are you logged in"
            " (hf auth login)?"
        ) from error
    return str(done.commit_url)
