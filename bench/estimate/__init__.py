"""Estimates without a clock: instructions, bytes, hours."""
