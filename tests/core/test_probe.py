"""The bare-backbone probe of every form."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ptv2_core.config import PromptConfig
from ptv2_core.data.encoding import EncodedSplit, encode_examples
from ptv2_core.data.tasks import TaskKind
from ptv2_core.errors import ConfigError
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from ptv2_core.training.probe import ProbeResult, probe
from tests.core.kind_parts import KINDS, kind_examples, kind_task
from tests.tiny import open_backbone, tiny_model

Folder = Callable[[str], Path]


@pytest.fixture
def probed(backbone_folder: Folder) -> Callable[[TaskKind], ProbeResult]:
    folder = backbone_folder("bert")

    def of(kind: TaskKind) -> ProbeResult:
        task = kind_task(kind)
        tokenizer = load_tokenizer(locate(str(folder)))

        def encoded(seed: int) -> EncodedSplit:
            examples = kind_examples(kind, 60, seed=seed)
            return encode_examples(examples, tokenizer, task=task, max_length=32)[0]

        return probe(
            tiny_model(open_backbone(folder), PromptConfig(length=3), task=task),
            task=task,
            # the training rows as dev show that they were learned
            splits=[encoded(0), encoded(0), encoded(1)],
            reads="tokens" if task.form == "tokens" else "mean",
            token_budget=200,
        )

    return of


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qa"])
def test_probe_learns_what_a_linear_layer_can(
    kind: TaskKind, probed: Callable[[TaskKind], ProbeResult]
) -> None:
    result = probed(kind)
    # a random backbone mixes the words of a row; without a span found the score is 0
    least = 0.4 if kind in ("tagging", "srl") else 0.8
    if kind in ("multiple_choice", "record"):
        least = 0.5
    assert result.dev.score > least
    assert 0 <= result.test.score <= 1 or kind == "regression"
    assert probed(kind).test.metrics == result.test.metrics


def test_probe_refuses_stretches_of_a_context(
    probed: Callable[[TaskKind], ProbeResult],
) -> None:
    with pytest.raises(ConfigError, match="task tiny: a probe is fitted to rows, options or"):
        probed("qa")
