"""A committed state as files for others: adapter, merged model, GGUF, Ollama; with a model card from the ledger."""
