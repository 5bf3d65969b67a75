"""The stages of a run, and what carries them out."""
