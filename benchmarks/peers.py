"""The peers: the paper's recipe, PEFT's prefix tuning, full fine-tuning.

Letters: B rows, T tokens, P prompt length, L layers, N heads, D head size, H hidden size.

A tuned peer has every advantage that its settings reach: rows of like length together, no dropout,
the faster of bf16 autocast and bf16 weights, the faster of both attention implementations, a plain
loop without the Trainer's bookkeeping, tensors padded beforehand, a fused optimizer and no
gradient clipping. With bf16 weights PEFT keeps the prompt in fp32 and trains the head in bf16.
Fine-tuning has no bf16 weights among its variants: AdamW's small steps are lost in their rounding.
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from benchmarks.lengths import BATCH_SIZE, MAX_LENGTH, NUM_CLASSES
from benchmarks.measure import PROMPT_LENGTH, Round, Setting, Way
from benchmarks.shapes import bert_tokenizer

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ATTENTIONS = ("eager", "sdpa")


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[dict[str, Tensor]],
    *,
    autocast: bool = False,
) -> Round:
    """Return a round over batches: forward, backward, step. The model returns its loss."""

    def once() -> float:
        model.train()
        started = time.perf_counter()
        for batch in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
        return time.perf_counter() - started

    return once


class PaperModel(nn.Module):
    """BertPrefixForSequenceClassification of the paper's released code, in today's Transformers.

    A frozen backbone left in training mode, so with the dropout of its configuration; the prompt
    as one embedding `[P, L * 2 * H]`, looked up once for each row of the batch, with dropout on
    the copies, handed over as past keys and values; the pooler's output, dropout and a linear
    head. Attention is the explicit one: the released code's Transformers had no other.
    """

    def __init__(self, setting: Setting) -> None:
        """Load the backbone and draw prompt and head."""
        super().__init__()
        self.bert = transformers.AutoModel.from_pretrained(
            setting.folder, attn_implementation="eager", dtype=torch.float32
        ).requires_grad_(False)
        config = self.bert.config
        # [P, L, 2, N, D] as one row of the embedding a position
        self.sizes = (config.num_hidden_layers * 2, config.num_attention_heads, -1)
        self.prompt = nn.Embedding(PROMPT_LENGTH, config.num_hidden_layers * 2 * config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, NUM_CLASSES)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, labels: Tensor
    ) -> transformers.modeling_outputs.SequenceClassifierOutput:
        """Return loss and logits of a batch `[B, T]`."""
        rows = len(input_ids)
        places = torch.arange(PROMPT_LENGTH).expand(rows, -1)  # [B, P]
        prompt = self.dropout(self.prompt(places).view(rows, PROMPT_LENGTH, *self.sizes))
        layers = prompt.permute(2, 0, 3, 1, 4).split(2)  # L times [2, B, N, P, D]
        encoded = self.bert(
            input_ids,
            attention_mask=torch.cat([torch.ones(rows, PROMPT_LENGTH), attention_mask], dim=1),
            token_type_ids=token_type_ids,
            past_key_values=transformers.DynamicCache(layers),
        )
        logits = self.classifier(self.dropout(encoded.pooler_output))
        return transformers.modeling_outputs.SequenceClassifierOutput(
            loss=nn.functional.cross_entropy(logits, labels), logits=logits
        )


def _paper(setting: Setting) -> Round:
    """Rows in random order, 32 a step, all padded to 128; fp32; AdamW."""
    torch.manual_seed(0)
    model = PaperModel(setting)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    rows = setting.sentences
    batches = [rows.tensors(batch, width=MAX_LENGTH) for batch in rows.in_random_order()]
    return plain_loop(model, optimizer, batches)


def _classifier(setting: Setting, **options: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model: transformers.PreTrainedModel = (
        transformers.AutoModelForSequenceClassification.from_pretrained(
            setting.folder, num_labels=NUM_CLASSES, **options
        )
    )
    return model


def _prefix(setting: Setting, **options: Any) -> nn.Module:
    settings = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=PROMPT_LENGTH)
    return peft.get_peft_model(_classifier(setting, **options), settings)


class _Clock(transformers.TrainerCallback):
    """Times the steps of a training, its set-up left out."""

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.started


def _peft_default(setting: Setting) -> Round:
    """The Transformers Trainer as it comes, but for 32 rows a step and nothing written."""
    dataset = [
        {
            "input_ids": row.input_ids,
            "token_type_ids": row.token_type_ids,
            "attention_mask": [1] * len(row.input_ids),
            "labels": row.label,
        }
        for row in setting.sentences.rows
    ]
    scratch = tempfile.TemporaryDirectory()
    clock = _Clock()
    trainer = transformers.Trainer(
        model=_prefix(setting),
        args=transformers.TrainingArguments(
            output_dir=scratch.name,
            per_device_train_batch_size=BATCH_SIZE,
            num_train_epochs=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=bert_tokenizer(),  # brings the collator that pads to the longest row
        callbacks=[clock],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)

    def once() -> float:
        assert scratch.name, "the folder lives as long as the trainer"
        trainer.train()
        return clock.seconds

    return once


def _tuned(
    setting: Setting,
    *,
    make: Callable[..., nn.Module],
    attention: str,
    dtype: torch.dtype,
    autocast: bool,
) -> Round:
    model = make(setting, attn_implementation=attention, dtype=dtype, **NO_DROPOUT)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    batches = [setting.sentences.tensors(rows) for rows in setting.sentences.grouped()]
    return plain_loop(model, optimizer, batches, autocast=autocast)


def _variants(
    make: Callable[..., nn.Module], formats: dict[str, tuple[torch.dtype, bool]]
) -> dict[str, Callable[[Setting], Round]]:
    return {
        f"{name}, {attention} attention": partial(
            _tuned, make=make, attention=attention, dtype=dtype, autocast=autocast
        )
        for (name, (dtype, autocast)), attention in itertools.product(formats.items(), ATTENTIONS)
    }


_AUTOCAST = {"bf16 autocast": (torch.float32, True)}
_WEIGHTS = {"bf16 weights": (torch.bfloat16, False)}

WAYS = (
    Way(
        key="paper_recipe",
        name="the paper's recipe: fp32, padded to 128, dropout",
        variants={"": _paper},
    ),
    Way(
        key="peft_default",
        name="PEFT prefix tuning, Transformers Trainer's defaults",
        variants={"": _peft_default},
    ),
    Way(
        key="peft_tuned",
        name="PEFT prefix tuning, tuned",
        variants=_variants(_prefix, _AUTOCAST | _WEIGHTS),
    ),
    Way(
        key="peft_autocast",
        name="the same, with the Trainer's own bf16: autocast over fp32 weights",
        variants=_variants(_prefix, _AUTOCAST),
    ),
    Way(
        key="finetune_tuned",
        name="full fine-tuning, tuned",
        variants=_variants(_classifier, _AUTOCAST),
    ),
)
