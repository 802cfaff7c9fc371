"""The engine: rows of many tasks, in batches, over one frozen backbone in processes of its own."""
