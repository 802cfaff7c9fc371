"""What every answer of a server should be: computed a prompt and text at a time, without one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serve_parts import Like, LocalRegistry, Prompts, offline, seed_of
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.model.backbones.base import Backbone

# of a probability: sums in bf16 differ with the rows that are computed beside
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What each version of each task answers to each text, computed one by one.

    Attributes:
        texts: That are asked.
        answers: By task and version, a prediction for each text; of a tagger with `shares`, the
            probabilities of the tags of each word that was not cut off.
        tolerance: How far a probability may be off.
    """

    texts: Sequence[str]
    answers: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]
    tolerance: float

    @property
    def tasks(self) -> list[str]:
        """The tasks that are asked."""
        return sorted({task for task, _ in self.answers})

    def versions(self, task: str) -> list[int]:
        """Return the versions of a task."""
        return sorted(version for name, version in self.answers if name == task)

    def problem(self, task: str, version: int, place: int, found: Mapping[str, Any]) -> str:
        """Say how an answer differs from what it should be; empty: it does not.

        Where two labels are equally likely within the tolerance, either is right.
        """
        if (task, version) not in self.answers:
            return f"{task}: version {version} was never registered"
        wanted = self.answers[(task, version)][place]
        differ = _tags_differ if "tags" in wanted else _labels_differ
        said = differ(wanted, found, self.tolerance)
        return f"{task}:{version}, text {place}: {said}" if said else ""

    def told_apart(self) -> float:
        """Return the share of texts and pairs of versions whose answers are not each other's."""
        pairs = [
            not self.problem(task, other, place, own)
            for (task, version), answers in self.answers.items()
            for other in self.versions(task)
            if other != version
            for place, own in enumerate(answers)
        ]
        return 1 - sum(pairs) / max(len(pairs), 1)


def _labels_differ(wanted: Mapping[str, Any], found: Mapping[str, Any], tolerance: float) -> str:
    shares, own = wanted["probabilities"], found["probabilities"]
    off = max(abs(share - own[label]) for label, share in shares.items())
    is_label = shares[wanted["label"]] - shares[found["label"]] <= 2 * tolerance
    if off <= tolerance and is_label:
        return ""
    return (
        f"expected {wanted['label']}, got {found['label']}; probabilities differ by up to {off:.4f}"
    )


def _tags_differ(wanted: Mapping[str, Any], found: Mapping[str, Any], tolerance: float) -> str:
    if found["tokens"] != wanted["tokens"]:
        return f"expected the words {wanted['tokens']}, got {found['tokens']}"
    if found["tags"] == wanted["tags"]:
        if found["spans"] == wanted["spans"]:
            return ""
        return f"expected the spans {wanted['spans']}, got {found['spans']}"
    # words that were cut off have no shares, and one tag alone
    cut = wanted["tags"][len(wanted["shares"]) :]
    shares = [*wanted["shares"], *({tag: 1.0} for tag in cut)]
    is_near = len(found["tags"]) == len(shares) and all(
        max(own.values()) - own.get(tag, 0.0) <= 2 * tolerance
        for own, tag in zip(shares, found["tags"], strict=True)
    )
    return "" if is_near else f"expected the tags {wanted['tags']}, got {found['tags']}"


def register_versions(
    registry: LocalRegistry,
    prompts: Prompts,
    versions: Mapping[str, int],
    likes: Sequence[Like | None] = (None,),
) -> None:
    """Register so many versions of each task; the first of each is its champion.

    Args:
        registry: Where.
        prompts: Makes them.
        versions: How many of each task.
        likes: What the tasks' prompts are like, in turn.
    """
    for place, (task, count) in enumerate(versions.items()):
        for number in range(count):
            like = likes[place % len(likes)]
            registry.add(prompts, task, seed=seed_of(task, number), like=like)


def compute_expected(
    registry: LocalRegistry, backbone: Backbone, texts: Sequence[str], versions: Mapping[str, int]
) -> Expected:
    """Answer every text with every version, one text at a time, without a server."""
    answers = {}
    for task, count in versions.items():
        for version in range(1, count + 1):
            predictor = offline(registry.folder(task, version), backbone)
            answers[(task, version)] = [_answered(predictor, text) for text in texts]
    tolerance = TOLERANCES[str(backbone.dtype).removeprefix("torch.")]
    return Expected(texts=texts, answers=answers, tolerance=tolerance)


def _answered(predictor: Predictor, text: str) -> Mapping[str, Any]:
    given = [{"text": text}]
    (found,) = predictor.predict(given)
    if "tags" not in found:
        return found
    (logits,) = predictor.logits(given)  # [words, C]
    labels = predictor.codec.task.labels
    shares = [dict(zip(labels, own, strict=True)) for own in logits.softmax(dim=-1).tolist()]
    return {**found, "shares": shares}
