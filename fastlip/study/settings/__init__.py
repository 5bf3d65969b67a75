"""The settings of a run, their presets, overrides and checks."""
