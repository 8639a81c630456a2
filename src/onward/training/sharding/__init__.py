"""Models that do not fit one device: weights, gradients and moments in shards on the ranks of a run."""
