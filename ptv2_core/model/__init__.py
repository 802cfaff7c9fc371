"""Batches in, logits out: the frozen backbone, the prompt bank and the heads."""
