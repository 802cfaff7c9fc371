"""Logits in, a trained prompt out."""
