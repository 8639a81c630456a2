"""Names of directories that are hard to write in a file that other programs read."""

from __future__ import annotations

NAMES = [
    "plain", "a b", "it's", 'say "so"', "100%", "%h", "$HOME", "${x}", "back\\slash", "end\\", "a;b", "ü", "end ",
    "a 'b' \"c\" %d $e \\f;",
]  # fmt: skip
