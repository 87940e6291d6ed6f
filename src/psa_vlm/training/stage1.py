"""Stage I, safety concept extraction: the bottleneck, then the safety tokens (2)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from psa_vlm.data.sample import Sample
from psa_vlm.inference import PsaVlm
from psa_vlm.model.backbone import Backbone
from psa_vlm.policy.policy import Policy
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.training.concepts import check_labelled, train_concepts
from psa_vlm.training.config import Stage1Config
from psa_vlm.training.fit import History
from psa_vlm.training.hints import saved_hints
from psa_vlm.training.language import dialogues, train_tokens
from psa_vlm.training.processes import main_first
from psa_vlm.training.runs import Run, loading, read_samples

_logger = logging.getLogger(__name__)


def run_stage1(config: Stage1Config, samples: Sequence[Sample] | None = None) -> PsaVlm:
    """Train stage I, or go on with it where it was killed, and write the run folder `config.out`.

    Args:
        config: what to do.
        samples: labelled and, for a backbone with a language model, answered; None reads
            `config.data`.

    Raises:
        ConfigError: a path of the configuration is wrong, or `out` holds another run.
        DataError: samples can't be used.
        CheckpointError: the backbone can't be read, or a checkpoint can't be written.
    """
    taxonomy = Taxonomy.load(config.taxonomy)
    policy = Policy.load(config.policy) if config.policy else Policy.default()
    policy.check(taxonomy)
    samples = read_samples(config, taxonomy) if samples is None else samples
    check_labelled(samples)
    how = loading(config)
    backbone = Backbone.from_pretrained(config.backbone, **how)
    if backbone.writes:
        dialogues(samples)  # what is missing shows before anything is trained
    run = Run(1, config, samples, [backbone.model])
    if run.finished:
        run.clean()
        return PsaVlm.from_pretrained(run.out, config.backbone, taxonomy, **how)
    bottleneck, concepts = train_concepts(
        backbone, taxonomy, samples, config.concepts, run.work("concepts")
    )
    model = PsaVlm(backbone, bottleneck, taxonomy, policy)
    histories = {"concepts": concepts}
    if backbone.writes:
        histories["tokens"] = _tokens(model, samples, config, run)
    elif config.tokens.count:
        _logger.warning(
            "%s has no language model: no safety tokens (2) are trained", backbone.source
        )
    run.finish(model, histories)
    return model


def _tokens(model: PsaVlm, samples: Sequence[Sample], config: Stage1Config, run: Run) -> History:
    work = run.work("tokens")
    with main_first():
        hints = saved_hints(
            work.folder / "hints.json", model, samples, config.concepts.encode_batch
        )
    return train_tokens(model.backbone, samples, config.tokens, work, hints)
