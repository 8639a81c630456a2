"""Training data: rows of a file, their tokens and loss masks, their order. Imports neither torch nor the ledger."""
