"""Measurements by the clock."""
