"""`python -m benchmarks`: run every benchmark and print its table."""

import transformers
from rich.console import Console

from benchmarks import training


def main() -> None:
    """Run all benchmarks."""
    # a peer's head that is not in the checkpoint is what we want, not news
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    Console().print(training.table(training.run()))


if __name__ == "__main__":
    main()
