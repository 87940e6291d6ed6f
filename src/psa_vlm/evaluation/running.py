"""Run a task on Inspect: whatever model, its log viewer, limit, epochs, retries and caching."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psa_vlm.errors import DataError, InputError, MissingExtra, PsaVlmError
from psa_vlm.evaluation.scorecard import git_commit

try:
    import inspect_ai
except ImportError:  # the core does without it
    raise MissingExtra("inspect_ai", "eval") from None
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import CachePolicy, Model, get_model
from inspect_ai.solver import generate

from psa_vlm.evaluation.judges import OFFLINE, judges, judges_it
from psa_vlm.evaluation.provider import PsaAPI
from psa_vlm.evaluation.results import Results
from psa_vlm.model.checkpoint import MANIFEST, fingerprint, home

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog

KEY = "PSA_VLM_API_KEY"
"""The environment variable with the key for a model at a URL."""


@dataclass(frozen=True)
class Asked:
    """How a task is run.

    Attributes:
        judges: by name.
        limit: most requests, drawn by the seed; None is all of them.
        epochs: how often each is asked.
        retries: how often one that failed is tried again.
        cache: whether replies are kept, so that the same request is not asked twice.
        seed: of the draw and of intervals.
        images_to_judges: whether a model as judge sees the images.
        display: of Inspect's progress: "rich", "plain" or "none".
    """

    judges: tuple[str, ...] = OFFLINE
    limit: int | None = None
    epochs: int = 1
    retries: int = 0
    cache: bool = False
    seed: int = 0
    images_to_judges: bool = True
    display: str = "none"


def model_named(name: str, **arguments: Any) -> Model:
    """A model by what a user calls it.

    Args:
        name: a folder (a run, a trained baseline, a checkpoint), a name of Inspect's, as in
            `openai/gpt-4o`, or the URL of an OpenAI-compatible service, as in
            `http://localhost:8000/v1#llava`.
        arguments: for our own provider; those that are None are left out.

    Raises:
        InputError: it is none of these, or arguments are given to a model that takes none.
        PsaVlmError: a folder can't be loaded.
    """
    given = {key: value for key, value in arguments.items() if value is not None}
    if Path(name).is_dir():
        return get_model(f"psa/{name}", memoize=False, **given)
    if given:
        raise InputError(f"{name}: {', '.join(given)} are for a model in a folder alone")
    if name.startswith(("http://", "https://")):
        url, _, served = name.partition("#")
        return get_model(
            f"openai-api/service/{served or 'psa-vlm'}",
            base_url=url,
            api_key=os.environ.get(KEY, "none"),
            memoize=False,
        )
    if "/" not in name or name.startswith((".", "/", "~")):
        raise InputError(
            f"{name}: no such folder; or name a model as Inspect does (openai/gpt-4o), or a URL"
        )
    try:
        return get_model(name)
    except PsaVlmError:
        raise
    except Exception as error:  # of the many providers
        raise InputError(f"{name}: Inspect can't use this model ({error})") from error


def evaluate(
    name: str,
    samples: Sequence[Sample],
    model: Model,
    asked: Asked,
    logs: Path,
    max_tokens: int = 512,
    data: str = "",
) -> tuple[Results, EvalLog]:
    """Put samples to a model and score its replies.

    Args:
        name: of the task.
        samples: as `psa_vlm.evaluation.tasks` makes them.
        model: as `model_named` gives it.
        asked: how.
        logs: the folder for the log, which `inspect view --log-dir` shows.
        max_tokens: most new tokens of a reply.
        data: where the samples come from, for the log.

    Raises:
        DataError: no judge can say anything of these requests.
        InputError: a judge is named twice.
        PsaVlmError: the run was stopped by an error, or every request failed.
    """
    scorers = judges(asked.judges, asked.images_to_judges)
    _check_judged(samples, asked.judges)
    task = inspect_ai.Task(
        dataset=MemoryDataset(list(samples), name=name),
        solver=generate(),
        scorer=scorers,
        name=name,
        metadata={
            "judges": list(asked.judges),
            "seed": asked.seed,
            "commit": git_commit(),
            "data": data,
        },
    )
    [log] = inspect_ai.eval(
        task,
        model=model,
        log_dir=str(logs),
        limit=asked.limit,
        sample_shuffle=None if asked.limit is None else asked.seed,
        epochs=asked.epochs,
        retry_on_error=asked.retries,
        fail_on_error=False,
        cache=_policy(model) if asked.cache else None,
        seed=None if isinstance(model.api, PsaAPI) else asked.seed,  # ours answers greedily
        max_tokens=max_tokens,
        display=asked.display,  # type: ignore[arg-type]
        score_display=False,
        ctl_server=False,
    )
    if log.status != "success" or not log.samples:
        reason = log.error.message if log.error else log.status
        raise PsaVlmError(f"{name}: the evaluation ended early ({reason}); see {log.location}")
    if all(sample.error for sample in log.samples):
        first = log.samples[0].error
        told = first.message if first else ""
        raise PsaVlmError(f"{name}: every request failed ({told}); see {log.location}")
    return Results.from_log(log), log


def _check_judged(samples: Sequence[Sample], names: Sequence[str]) -> None:
    if not any(judges_it(name, sample.metadata or {}) for name in names for sample in samples):
        raise DataError(
            f"none of these judges can judge these requests ({', '.join(names)}); they need a "
            "model as judge, as in --judge openai/gpt-4o"
        )


def _policy(model: Model) -> CachePolicy:
    """Replies are kept apart by all that decides them: of ours, weights and arguments too."""
    if not isinstance(model.api, PsaAPI):
        return CachePolicy(expiry=None)
    folder = Path(model.api.model_name)
    scopes = {"arguments": repr(sorted(model.model_args.items())), "commit": git_commit()}
    if (home(folder) / MANIFEST).is_file():
        scopes["weights"] = fingerprint(folder)
    else:
        files = sorted(one for one in folder.rglob("*") if one.is_file())
        scopes["weights"] = repr([(str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files])
    return CachePolicy(expiry=None, scopes=scopes)
