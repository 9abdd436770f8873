"""Tasks, clients and batches: from files or a hub to token ids."""
