"""The ledger: what became of every file, durable and readable by others while a run trains. Does not import torch."""
