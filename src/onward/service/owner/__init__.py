"""The one process that owns a run: it takes files in, trains them, obeys requests and survives faults."""
