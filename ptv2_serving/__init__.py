"""Production: prompts pulled from the registry and served on one frozen backbone."""
