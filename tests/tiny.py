"""Tiny random parts that tests are built from: backbones, tokenizers, tasks, artifacts.

Letters: L layers, N heads, D head size, H hidden size.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CamembertConfig,
    CamembertModel,
    ElectraConfig,
    ElectraModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    RobertaTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from ptv2_core.artifact import Weights, save_artifact
from ptv2_core.config import HeadConfig, PromptConfig, TrainConfig
from ptv2_core.data.encoding import EncodedSplit, encode_examples
from ptv2_core.data.examples import Example, TextExample, TokensExample
from ptv2_core.data.tasks import METRICS, TaskSpec
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from ptv2_core.model.heads import LinearHead, reading_for
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import PromptBank, make_prompt

WORDS = [
    "book",
    "play",
    "cancel",
    "move",
    "call",
    "find",
    "show",
    "tell",
    "buy",
    "send",
    "table",
    "song",
    "meeting",
    "flight",
    "alarm",
    "taxi",
    "in",
    "on",
    "at",
    "to",
    "from",
    "for",
    "the",
    "a",
    "my",
    "next",
    "last",
    "please",
    "not",
    "never",
    "all",
    "some",
    "rome",
    "paris",
    "oslo",
    "lima",
    "anna",
    "bob",
    "carla",
    "dan",
    "monday",
    "friday",
    "noon",
    "nine",
    "##s",
    "##ing",
    "##ed",
]

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "vocab_size": 5 + len(WORDS),
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.2,
}

MODELS = {
    "bert": (BertConfig, BertModel),
    "roberta": (RobertaConfig, RobertaModel),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel),
    "camembert": (CamembertConfig, CamembertModel),
    "electra": (ElectraConfig, ElectraModel),
}

LANGUAGE_MODELS = {
    "bert": (BertConfig, BertForMaskedLM),
    "roberta": (RobertaConfig, RobertaForMaskedLM),
}


def tiny_backbone(folder: Path, model_type: str = "bert", *, seed: int = 0) -> Path:
    """Save a random backbone of 3 layers with a WordPiece tokenizer; returns its folder."""
    config_class, model_class = MODELS[model_type]
    extra = {"embedding_size": 24} if model_type == "electra" else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**SIZES, **extra, pad_token_id=0))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def tiny_language_model(folder: Path, model_type: str = "bert") -> Path:
    """Save a random masked language model of 3 layers, no bias zero; returns its folder."""
    config_class, model_class = LANGUAGE_MODELS[model_type]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config_class(**SIZES, pad_token_id=0))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Save a WordPiece tokenizer of a few words."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    special = {"type_id": 0}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": place, "content": name, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True,
            }
            for place, name in enumerate(vocabulary[:5])
        ],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
            "strip_accents": None, "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "[CLS]", **special}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", **special}},
            ],
            "pair": [
                {"SpecialToken": {"id": "[CLS]", **special}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", **special}},
                {"Sequence": {"id": "B", "type_id": 1}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 1}},
            ],
            "special_tokens": {
                "[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]},
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {word: place for place, word in enumerate(vocabulary)},
        },
    }  # fmt: skip
    names = ("unk", "sep", "pad", "cls", "mask")
    settings = {f"{name}_token": f"[{name.upper()}]" for name in names}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def byte_level_backbone(folder: Path) -> Path:
    """Save a tiny RoBERTa with a byte-level tokenizer of single letters, as RoBERTa's is made."""
    tiny_backbone(folder, "roberta")
    letters = ["<s>", "<pad>", "</s>", "<unk>", "\u0120", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    wrapped = RobertaTokenizerFast(tokenizer_object=tokenizer, add_prefix_space=False)
    wrapped.save_pretrained(folder)
    return folder


def without_pooler(folder: Path) -> Path:
    """Take the pooler out of a saved backbone, as many checkpoints come."""
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "pooler" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    return folder


def task_of(kind: str = "classification", *, pair: bool = False) -> TaskSpec:
    """Return a task of three classes, or of two span types."""
    if kind == "tagging":
        labels = ("O", "B-city", "I-city", "B-person", "I-person")
        fields = {"tokens": "tokens", "tags": "tags"}
    else:
        labels = ("alarm", "flight", "song")
        fields = {"text": "text", "label": "label"} | ({"text_pair": "other"} if pair else {})
    return TaskSpec(name="tiny", kind=kind, labels=labels, fields=fields, metric=METRICS[kind])  # type: ignore[arg-type,index]


def examples_of(kind: str, count: int, *, seed: int = 0) -> list[Example]:
    """Return random rows of 2 to 9 words whose label or tags are a function of the words."""
    generator = torch.Generator().manual_seed(seed)
    plain = [word for word in WORDS if not word.startswith("##")]
    rows: list[Example] = []
    for _ in range(count):
        length = int(torch.randint(2, 10, (1,), generator=generator))
        chosen = [plain[i] for i in torch.randint(len(plain), (length,), generator=generator)]
        if kind == "tagging":
            names = {
                "rome": "city",
                "paris": "city",
                "oslo": "city",
                "anna": "person",
                "bob": "person",
            }
            tags = tuple(f"B-{names[word]}" if word in names else "O" for word in chosen)
            rows.append(TokensExample(tokens=tuple(chosen), tags=tags))
        else:
            label = ("alarm", "flight", "song")[len(rows) % 3]
            rows.append(TextExample(text=" ".join([label, *chosen]), text_pair=None, label=label))
    return rows


def encode_for(folder: Path, examples: list[Example], task: TaskSpec) -> EncodedSplit:
    """Encode examples with a tiny backbone's tokenizer."""
    tokenizer = load_tokenizer(locate(str(folder)))
    return encode_examples(examples, tokenizer, task=task, max_length=32)[0]


def open_backbone(folder: Path) -> Backbone:
    """Load a tiny backbone on the CPU in fp32."""
    return load_backbone(str(folder), precision="fp32", device="cpu")


def tiny_model(
    backbone: Backbone,
    *prompts: PromptConfig,
    task: TaskSpec | None = None,
    classes: tuple[int, ...] = (),
) -> PromptedModel:
    """Return a model with a slot per prompt; heads of the task, or of the given classes."""
    shape = backbone.spec.shape
    slots = [(make_prompt(shape, p, seed=place), p) for place, p in enumerate(prompts)]
    form = task.form if task else "rows"
    sizes = classes or (task.num_outputs if task else 3,) * len(prompts)
    heads = [
        LinearHead(
            backbone.spec.hidden_size,
            size,
            reads=reading_for(form, backbone.spec.reads),
            seed=place,
            hides_padding=form == "spans",
        )
        for place, size in enumerate(sizes)
    ]
    model = PromptedModel(backbone, PromptBank(shape, slots), heads)
    model.eval()
    return model


def tiny_artifact(
    folder: Path,
    backbone_folder: Path,
    *,
    kind: str = "classification",
    seed: int = 0,
    pair: bool = False,
) -> Path:
    """Save an artifact with a random prompt of 4 positions; returns `folder`."""
    backbone = open_backbone(backbone_folder)
    location = locate(str(backbone_folder))
    task = task_of(kind, pair=pair)
    config = TrainConfig(prompt=PromptConfig(length=4), seed=seed)
    prompt = make_prompt(backbone.spec.shape, config.prompt, seed=seed)
    head = LinearHead(
        backbone.spec.hidden_size,
        task.num_outputs,
        reads=reading_for(task.form, backbone.spec.reads),
        seed=seed,
    )
    model = PromptedModel(
        backbone, PromptBank(backbone.spec.shape, [(prompt, config.prompt)]), [head]
    )
    model.eval()
    predictor = Predictor(model, load_tokenizer(location), task, max_length=32)
    given: dict[str, Any] = {"text": "book the flight to rome"} | (
        {"text_pair": "not on monday"} if pair else {}
    )
    if kind == "tagging":
        given = {"tokens": ["call", "anna", "in", "paris"]}
    golden = [{"input": given, "logits": predictor.logits([given])[0].tolist()}]
    save_artifact(
        folder,
        Weights.of(model),
        task=task,
        method="ptv2",
        prompt=config.prompt,
        head=HeadConfig(reads=backbone.spec.reads),
        backbone=backbone.spec.to_mapping(),
        tokenizer_digest=location.tokenizer_digest(),
        encoding={"max_length": 32},
        decoding={},
        training={**config.to_mapping(), "study": None, "trial": None},
        provenance={
            "git_commit": None,
            "data": {split: f"sha256:{seed}{split}" for split in ("train", "dev", "test")},
            "versions": {},
        },
        metrics={f"dev_{task.metric}": 0.5},
        golden=golden,
    )
    return folder
