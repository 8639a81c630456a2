"""A smaller model in place of a large one: what is proven of it holds for the large one too."""
