"""Backbones: the only place that knows the insides of Transformers."""
