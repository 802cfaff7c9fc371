"""`python -m benchmarks`: run every benchmark and print its table."""

from rich.console import Console

from benchmarks import training


def main() -> None:
    """Run all benchmarks."""
    Console().print(training.table(training.run()))


if __name__ == "__main__":
    main()
