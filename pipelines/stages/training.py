"""What search, train and evaluate share: the backbone of the settings, and one training."""

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.settings import TaskSettings
from pipelines.stages.prepare import Prepared
from ptv2_core.config import TrainConfig
from ptv2_core.errors import DataError
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.training.fit import TrainReport, fit
from ptv2_core.training.start import check_positions, new_model


def backbone_for(settings: TaskSettings, prepared: Prepared) -> Backbone:
    """Load the backbone of the settings, and check that the data was encoded with its tokenizer.

    Raises:
        BackboneError: It is not there, or is another one.
        DataError: The data was encoded with another tokenizer.
    """
    chosen = settings.backbone
    found = locate(chosen.name, chosen.revision).tokenizer_digest()
    if found != prepared.tokenizer_digest:
        raise DataError(
            f"data/prepared/{settings.name}: encoded with tokenizer {prepared.tokenizer_digest}, "
            f"but {chosen.name} has {found}; run `ptv2 prepare --task {settings.name}` again"
        )
    return load_backbone(
        chosen.name,
        chosen.revision,
        digest=chosen.digest,
        precision=chosen.precision,
        device=chosen.device,
    )


def overlay(base: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """Return settings with nested `changes` laid over them, checked again."""
    values = base.to_mapping()
    for key, value in changes.items():
        is_section = isinstance(value, Mapping)
        values[key] = {**values[key], **value} if is_section else value
    return TrainConfig.from_mapping(values)


def start_training(
    backbone: Backbone, prepared: Prepared, config: TrainConfig
) -> tuple[PromptedModel, Iterator[TrainReport]]:
    """Return a new model and the generator that trains it.

    Raises:
        ConfigError: The prompt is longer than the backbone's positions allow.
    """
    splits = prepared.splits
    check_positions(backbone, config.prompt.length, list(splits.values()))
    model = new_model(backbone, prepared.task, config, splits["train"])
    reports = fit(
        model, task=prepared.task, train=splits["train"], dev=splits["dev"], config=config
    )
    return model, reports
