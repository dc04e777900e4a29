"""Photos, pairs in the layouts people have on disk, and synthetic degradations of clean photos."""
