"""From residual maps to decisions: false-alarm calibration, defect ledger, recurrence along the strip."""
