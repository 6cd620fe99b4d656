"""Certified calibration: exit thresholds with a stated risk, confidence and sample size."""
