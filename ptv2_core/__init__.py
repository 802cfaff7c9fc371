"""P-Tuning v2 (arXiv 2110.07602): deep prompts, many tasks on one frozen transformer."""

__version__ = "0.1.0"
