"""`python -m benchmarks`: the training benchmark in its quick form; takes its options."""

import sys

from benchmarks import train


def main() -> None:
    """Run it."""
    train.main(["--quick", *sys.argv[1:]])


if __name__ == "__main__":
    main()
