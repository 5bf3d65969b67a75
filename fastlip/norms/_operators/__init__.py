"""Linear maps: convolutions of one geometry, compositions of them, and the maps of torch's modules."""
