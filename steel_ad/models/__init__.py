"""Networks as flax.linen modules: pure functions of (variables, x)."""
