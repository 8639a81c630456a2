"""Imported first by a process that must not initialize CUDA yet: hides bitsandbytes from it.

peft imports bitsandbytes, which asks the GPU what it can do as it is imported, and that initializes CUDA. Processes
that are forked afterwards could not use the GPU, so that each would have to import everything itself.
"""

import sys

sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
