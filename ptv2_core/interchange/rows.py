"""How a backbone's tokenizer is changed before it makes rows, which who uses PEFT must do too."""

from ptv2_core.data.encoding import has_second_text
from ptv2_core.evaluation.inputs import examples_of_inputs
from ptv2_core.manifest import Manifest
from ptv2_core.model.backbones.locating import Location
from ptv2_core.model.backbones.tokenizing import Change, open_tokenizer


def row_changes(manifest: Manifest, location: Location) -> tuple[Change, ...]:
    """Return the changes that the rows of a prompt's task show.

    Args:
        manifest: Of the prompt.
        location: Where its backbone is.

    Raises:
        BackboneError: There is no tokenizer that is fast and fits.
    """
    task = manifest.task
    _, changes = open_tokenizer(location, words=task.form == "tokens")
    examples = examples_of_inputs([example["input"] for example in manifest.golden], task)
    # where there is none to see, a note too many does less harm than one too few
    has_pairs = not examples or any(has_second_text(example, task) for example in examples)
    return tuple(change for change in changes if has_pairs or not change.is_of_pairs)
