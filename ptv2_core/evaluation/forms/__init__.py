"""The rules of each form of task; each module here but `base` is one."""

from ptv2_core.data.tasks import Form
from ptv2_core.evaluation.forms import options, rows, spans, tokens, values
from ptv2_core.evaluation.forms.base import FormRules

RULES: dict[Form, FormRules] = {
    "rows": rows,
    "values": values,
    "options": options,
    "tokens": tokens,
    "spans": spans,
}


def rules_of(form: Form) -> FormRules:
    """Return what a form brings to the loop."""
    return RULES[form]
