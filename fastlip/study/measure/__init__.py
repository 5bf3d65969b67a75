"""Measurements of a trained network."""
