"""What a model computes, measured without changing it: the handover's probe, and scores on rows."""
