"""Scores and answers."""
