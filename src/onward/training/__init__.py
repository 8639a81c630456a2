"""Model, optimizer, step, checkpoint: a run's state and how it changes. Knows nothing of the ledger."""
