"""Prompts in PEFT's format of prefix tuning, out and in; PEFT itself is not needed."""
