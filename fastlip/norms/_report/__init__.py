"""The norms of a model's layers as an object, as text and as a page."""
