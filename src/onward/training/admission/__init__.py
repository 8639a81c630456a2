"""The admission: what is proven about a model before the first step, and what is refused."""
