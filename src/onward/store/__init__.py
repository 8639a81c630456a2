"""The ledger: what came of every file, durable and readable by others while a run trains. Imports no torch."""
