"""The curve, as views import it; it lies below them, for `Run.metrics` needs it too."""

from onward.curve import COLUMNS, as_columns, buckets, read_curve

__all__ = ["COLUMNS", "as_columns", "buckets", "read_curve"]
