"""Training: state (a struct of arrays), step (pure), loop (cadence, late metrics), checkpoint."""
