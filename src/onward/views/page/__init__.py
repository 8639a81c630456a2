"""A run in the browser: what the ledger says, live, and the same requests as the command line makes."""
