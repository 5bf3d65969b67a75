"""What a run does: its settings, their presets and their checks."""
