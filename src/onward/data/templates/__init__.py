"""Chat templates: rendered, and examined by their syntax trees."""
