"""Restoring photos: the backends, tiling and the `Restorer`."""
