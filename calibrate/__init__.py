"""Calibration: block in, block out."""
