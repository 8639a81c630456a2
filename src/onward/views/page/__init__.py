"""A run in the browser: what the ledger says, live, and the same requests as on the command line."""
