"""Surface defect detection on patterned steel plates, in JAX."""
