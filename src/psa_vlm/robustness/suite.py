"""The standard suite on one run; each trial is kept on disk, so that a stopped suite goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from psa_vlm.evaluation import kept
from psa_vlm.evaluation.scorecard import git_commit
from psa_vlm.inference import PsaVlm
from psa_vlm.progress import track
from psa_vlm.robustness.checks import check
from psa_vlm.robustness.outcomes import Outcome, rates
from psa_vlm.robustness.results import Results
from psa_vlm.robustness.smoothing import Smoothing, certify
from psa_vlm.robustness.trials import Cases, MakeSurrogate, Plan, Suite
from psa_vlm.robustness.victim import picture_of
from psa_vlm.training.features import image_key


def run_suite(
    model: PsaVlm,
    cases: Cases,
    plan: Plan,
    out: Path,
    name: str,
    surrogate: MakeSurrogate | None = None,
) -> Results:
    """Put every attack to a run.

    A trial whose outcomes are in `out` is not run again, if they are of the same run, policy,
    requests, plan and code.

    Args:
        model: the run, under the policy that is attacked.
        cases: requests.
        plan: how much is tried.
        out: a folder for trials and noisy encodings.
        name: of the run, for the report.
        surrogate: as of `Suite`.

    Raises:
        DataError, InputError: a request can't be used.
    """
    started = time.monotonic()
    cases = cases.first(plan.samples)
    suite = Suite(model, cases, plan, surrogate)
    samples = [*cases.risky, *cases.harmless]
    asked = [(one.id, one.question, image_key(picture_of(one))) for one in samples]
    folder = out / "trials" / kept.key(kept.identity(model), asked, asdict(plan))
    outcomes: list[Outcome] = []
    for trial in track(list(suite.trials()), "attacks"):
        key = kept.key(trial.attack, trial.setting, trial.goal)
        outcomes += kept.rows(folder / f"{key}.jsonl", Outcome, trial.run)
    how = Smoothing(draws=plan.draws, seed=plan.seed)
    certificate = certify(model, cases.risky, cases.harmless, how, out / "noisy")
    found = rates(outcomes)
    return Results(
        run=name,
        policy=model.policy.name,
        data=cases.data,
        judge="the decision of the head" if cases.judge is None else cases.judge.name,
        plan=asdict(plan),
        rates=found,
        summary=rates(_pooled(outcomes)),
        warnings=check(found, outcomes),
        notes=suite.notes,
        certificate=certificate.to_dict(),
        commit=git_commit(),
        seconds=time.monotonic() - started,
    )


def _pooled(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The same with the strengths of each corruption put together."""
    return [
        replace(one, setting=one.setting.rsplit(" ", 1)[0]) if one.attack == "corruption" else one
        for one in outcomes
    ]
