"""Surface defect detection on patterned steel plates, in JAX."""

__version__ = "0.1.0"
