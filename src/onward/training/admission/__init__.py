"""The admission: what is proven of the model at hand before the first step, and what is refused."""
