"""What an experiment does from data to report: fit, calibrate, score, write."""
