import pytest

from pipelines.gate import decide

NEW = {"metric": "accuracy", "test_score": "0.9", "test_digest": "sha256:a"}


def gate(champion_scores=None, *, champion=1, margin=0.0, scores=NEW):
    known = champion_scores or {}
    return decide(
        task="intents",
        version=2,
        scores=scores,
        champion=champion,
        champion_scores=known,
        margin=margin,
    )


def test_first_version_becomes_champion():
    decision = gate(champion=None)
    assert decision.promoted
    assert decision.champion_version is None


@pytest.mark.parametrize(
    ("score", "margin", "promoted"),
    [
        ("0.8", 0.0, True),
        ("0.9", 0.0, False),
        ("0.95", 0.0, False),
        ("0.85", 0.1, False),
        ("0.7", 0.1, True),
    ],
)
def test_champion_must_be_beaten_by_more_than_the_margin(score, margin, promoted):
    decision = gate(NEW | {"test_score": score}, margin=margin)
    assert decision.promoted is promoted
    assert decision.champion_version == 1
    assert decision.champion_score == float(score)
    assert "champion version 1" in decision.reason


@pytest.mark.parametrize(("new", "old", "promoted"), [("-0.1", "-0.2", True), ("-0.3", "0", False)])
def test_correlations_may_be_negative(new, old, promoted):
    scores = NEW | {"metric": "pearson", "test_score": new}
    decision = gate(scores | {"test_score": old}, scores=scores)
    assert decision.promoted is promoted
    assert decision.score == float(new)
    is_above = "above" if promoted else "not above"
    assert f"test pearson {float(new):.4f} is {is_above} the {float(old):.4f}" in decision.reason


def test_other_test_split_is_not_comparable_and_says_what_to_do():
    decision = gate(NEW | {"test_score": "0.1", "test_digest": "sha256:b"})
    assert not decision.promoted
    assert "not comparable" in decision.reason
    assert decision.reason.endswith("all the same: ptv2 promote intents:2")


def test_other_metric_is_not_comparable():
    decision = gate(NEW | {"test_score": "0.1", "metric": "span_f1"})
    assert not decision.promoted
    assert "span_f1" in decision.reason


@pytest.mark.parametrize("tags", [{}, {"test_score": "good"}, {"test_score": "nan"}])
def test_champion_without_a_score_stays(tags):
    decision = gate(tags)
    assert not decision.promoted
    assert "no test score" in decision.reason
    assert decision.champion_score is None


def test_score_that_is_no_number_is_never_promoted():
    assert not gate(champion=None, scores=NEW | {"test_score": "nan"}).promoted


def test_champion_registered_again_stays():
    decision = gate(NEW, champion=2)
    assert not decision.promoted
    assert "already" in decision.reason


@pytest.mark.parametrize(
    ("new", "old", "compares"),
    [
        ("float32", "bfloat16", True),
        ("float32", None, True),
        ("int8+float32", "int8+float32", True),
        ("int8+float32", "int8+bfloat16", False),
        ("bnb-nf4+bfloat16", "bfloat16", False),
        ("float32", "int8+float32", False),
        ("int8+float32", None, False),
    ],
)
def test_scores_of_rounded_backbones_compare_with_their_like_alone(new, old, compares):
    known = NEW | {"test_score": "0.1"} | ({"number_format": old} if old else {})
    decision = gate(known, scores=NEW | {"number_format": new})
    assert decision.promoted is compares
    assert ("not comparable" in decision.reason) is not compares
    if not compares:
        assert new in decision.reason
        assert (old or "a format that was not noted") in decision.reason
