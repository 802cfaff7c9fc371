"""Exported prompts whose tokenizer is changed here: the README's code makes the same rows."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ptv2_core.evaluation.predict import Predictor
from ptv2_core.interchange.export import export_peft
from tests.core.hub_parts import LETTERS, PATTERN, changed, lettered
from tests.core.interchange_parts import Folder, a_task, inputs_of, prompt_of, run_readme

END = "<|endoftext|>"
MARK = {"template": (f"{END} $A", f"{END} $A $B:1"), "eos_token": END}
# tokenizers that put nothing between two texts, and what is put there
APART = [
    ({"eos_token": END}, (END, "0")),
    ({"eos_token": END, "sep_token": "-"}, ("-", "29")),
    ({"eos_token": END, "pre_tokenizer": PATTERN}, (END, "0")),
    ({}, ("\n", "2")),
    (MARK, (END, "0")),
]


def rows_of(prompt: Path) -> list[list[int]]:
    """Return our rows of the inputs."""
    predictor = Predictor.load(prompt, device="cpu", precision="fp32")
    split = predictor.codec.encode(inputs_of(predictor.task)).split
    edges = zip(split.offsets, split.offsets[1:], strict=False)
    return [split.input_ids[start:end].tolist() for start, end in edges]


def theirs(tokenizer: Any, task: Any) -> list[list[int]]:
    """Return the rows that a user of PEFT makes of the inputs."""
    inputs = inputs_of(task)
    sizes: dict[str, Any] = {"truncation": True, "max_length": 32}
    if task.kind == "tagging":
        words = [one["tokens"] for one in inputs]
        found = tokenizer(words, is_split_into_words=True, **sizes)
    elif task.kind == "qa":
        firsts, seconds = ([one[key] for one in inputs] for key in ("question", "context"))
        sizes |= {"truncation": "only_second", "stride": 4, "return_overflowing_tokens": True}
        found = tokenizer(firsts, seconds, **sizes)
    else:
        seconds = [one["text_pair"] for one in inputs] if "text_pair" in task.fields else None
        found = tokenizer([one["text"] for one in inputs], seconds, **sizes)
    return list(found["input_ids"])


@pytest.mark.parametrize(("settings", "named"), APART)
@pytest.mark.parametrize("kind", ["classification", "qa"])
def test_export_brings_code_that_puts_the_separator_between_two_texts(
    tmp_path: Path, kind: str, settings: dict[str, Any], named: tuple[str, str]
) -> None:
    backbone = lettered(tmp_path / "backbone", **settings)
    task = a_task(kind, has_pairs=kind == "classification")
    prompt = prompt_of(tmp_path / "prompt", backbone, task, reads="last")
    (note,) = [one for one in export_peft(prompt, tmp_path / "peft").notes if "Between" in one]
    assert note.startswith(f"Between two texts stands {named[0]!r} (token {named[1]}). The")
    assert f"- {note}\n" in (tmp_path / "peft" / "README.md").read_text()
    rows = rows_of(prompt)
    assert theirs(run_readme(tmp_path / "peft")["tokenizer"], task) == rows
    # what the code is for
    assert theirs(AutoTokenizer.from_pretrained(backbone), task) != rows


@pytest.mark.parametrize("pre_tokenizer", ["bytes", "pattern", "metaspace"])
@pytest.mark.parametrize("is_normalized", [True, False])
def test_export_brings_code_that_puts_a_space_before_each_word(
    tmp_path: Path, pre_tokenizer: str, is_normalized: bool
) -> None:
    backbone = lettered(tmp_path / "backbone")
    letters = [*LETTERS, "\u2581"]
    made = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = {
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "pattern": PATTERN,
        "metaspace": pre_tokenizers.Metaspace(prepend_scheme="never"),
    }[pre_tokenizer]
    if is_normalized:
        made.normalizer = normalizers.NFC()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END).save_pretrained(backbone)
    changed(backbone / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    changed(backbone / "config.json", model_type="gpt2")
    task = a_task("tagging")
    prompt = prompt_of(tmp_path / "prompt", backbone, task, reads="last")
    notes = export_peft(prompt, tmp_path / "peft").notes
    assert [one for one in notes if one.startswith("Before each word of tokenizer(words, ")]
    assert not [one for one in notes if "Between two texts" in one]
    rows = rows_of(prompt)
    assert theirs(run_readme(tmp_path / "peft")["tokenizer"], task) == rows
    assert theirs(AutoTokenizer.from_pretrained(backbone), task) != rows


def test_export_of_rows_that_the_tokenizer_makes_itself_says_nothing_of_them(
    tmp_path: Path, backbone_folder: Folder
) -> None:
    of_pairs = a_task("classification", has_pairs=True)
    for number, (backbone, task, reads) in enumerate(
        [
            (backbone_folder("bert"), of_pairs, "cls"),
            (backbone_folder("bert"), a_task("tagging"), "cls"),
            (lettered(tmp_path / "gpt2", eos_token=END), a_task("classification"), "last"),
        ]
    ):
        prompt = prompt_of(tmp_path / f"prompt{number}", backbone, task, reads=reads)
        notes = export_peft(prompt, tmp_path / f"peft{number}").notes
        assert not [one for one in notes if "stands" in one]
        assert "AutoTokenizer" not in (tmp_path / f"peft{number}" / "README.md").read_text()
