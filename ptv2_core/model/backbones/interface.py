"""Injection through Transformers' attention interface: BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA."""

from torch import Tensor, nn

from ptv2_core.model.attention import PromptBatch

# model_type -> whether positions start after the padding id, as in the RoBERTa family
MODEL_TYPES = {
    "bert": False,
    "electra": False,
    "roberta": True,
    "xlm-roberta": True,
    "camembert": True,
}


def inject(
    model: nn.Module,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    positions: Tensor,
    prompts: PromptBatch,
) -> tuple[Tensor, Tensor | None]:
    """Pass the prompts as a keyword that reaches every layer's attention function.

    Args:
        model: A model whose configuration names our attention function.
        input_ids: `[B, T]`.
        token_type_ids: `[B, T]` or None.
        positions: `[B or 1, T]`.
        prompts: Keys, values and mask for every layer.

    Returns:
        The last hidden states `[B, T, H]` and the pooled `[B, H]`, where there is one.
    """
    output = model(
        input_ids=input_ids,
        token_type_ids=token_type_ids,
        position_ids=positions,
        prompts=prompts,
    )
    return output.last_hidden_state, getattr(output, "pooler_output", None)
