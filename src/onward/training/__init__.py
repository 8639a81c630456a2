"""Model, optimizer, step, checkpoint: what a run's state is and how it moves. Knows nothing of the ledger."""
