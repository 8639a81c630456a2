"""Everything that changes a run, in packages by task; the modules here are what these build on."""
