"""How one optimizer step is computed: its parts, its loss, and the memory that it takes."""
