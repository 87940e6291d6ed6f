"""The error tree: exit codes, and messages that survive a process boundary."""

from __future__ import annotations

import pickle

import pytest

from psa_vlm import errors

EXIT_CODES = {
    "PsaVlmError": 1,
    "InputError": 2,
    "ImageError": 2,
    "DataError": 2,
    "PolicyError": 2,
    "ConfigError": 2,
    "NoLanguageModel": 2,
    "CheckpointError": 1,
    "TaxonomyMismatch": 1,
    "VerdictError": 1,
    "RequestError": 2,
    "Overloaded": 1,
    "AuditError": 1,
    "MissingExtra": 1,
}


def test_the_tree_holds_these_errors_and_no_other() -> None:
    found = {
        name: value.exit_code
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.PsaVlmError)
    }
    assert found == EXIT_CODES


def test_a_taxonomy_mismatch_is_a_checkpoint_error() -> None:
    assert issubclass(errors.TaxonomyMismatch, errors.CheckpointError)


def test_a_missing_extra_names_its_install_command() -> None:
    error = errors.MissingExtra("plotly", "eval")
    assert str(error) == "plotly is not installed; run: pip install 'psa-vlm[eval]'"


@pytest.mark.parametrize(
    "error",
    [
        errors.ImageError("a.png: gone"),
        errors.MissingExtra("plotly", "eval"),
        errors.NoLanguageModel("reply", "clip"),
        errors.Overloaded(3),
        errors.RequestError("no such model", "model", "model_not_found", 404),
    ],
)
def test_errors_cross_process_boundaries(error: errors.PsaVlmError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
