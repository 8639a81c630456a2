"""What computes: the device and its memory, how steps are computed on it, and the record of all this."""
