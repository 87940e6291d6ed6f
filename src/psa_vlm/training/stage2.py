"""Stage II, safety alignment: the language model learns to answer beside the hints it will see."""

from __future__ import annotations

from collections.abc import Sequence

from psa_vlm.data.sample import Sample
from psa_vlm.inference import PsaVlm
from psa_vlm.model.checkpoint import home, settled
from psa_vlm.policy.policy import Policy
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.training.config import Stage2Config
from psa_vlm.training.hints import saved_hints
from psa_vlm.training.language import dialogues, train_lora
from psa_vlm.training.processes import main_first
from psa_vlm.training.runs import Run, loading, read_samples


def run_stage2(config: Stage2Config, samples: Sequence[Sample] | None = None) -> PsaVlm:
    """Train stage II on a run of stage I, or go on with it, and write the run folder `config.out`.

    Args:
        config: what to do.
        samples: answered; None reads `config.data`.

    Returns:
        The aligned model, its adapter merged.

    Raises:
        ConfigError: a path of the configuration is wrong, or `out` holds another run.
        DataError: samples can't be used.
        CheckpointError: the run of stage I can't be read, or a checkpoint can't be written.
        NoLanguageModel: the run is on a dual encoder.
    """
    how = loading(config)
    if samples is None:
        samples = read_samples(config, Taxonomy.from_yaml(home(config.model) / "taxonomy.yaml"))
    dialogues(samples)  # what is missing shows before anything is loaded
    model = PsaVlm.from_pretrained(config.model, **how)
    model.backbone.check_writes("stage II")
    run = Run(2, config, samples, [model.backbone.model, model.bottleneck], config.model)
    if run.finished:
        run.clean()
        return PsaVlm.from_pretrained(run.out, **how)
    if config.policy:
        model.policy = Policy.load(config.policy)
        model.policy.check(model.taxonomy)
    work = run.work("lora")
    with main_first():
        hints = saved_hints(
            work.folder / "hints.json",
            model,
            samples,
            config.assess_batch,
            config.misstated_hints,
            config.seed,
        )
    adapter, history = train_lora(model.backbone, dialogues(samples, hints), config.lora, work)
    model.adapter = settled(adapter)
    run.finish(model, {"lora": history})
    return model
