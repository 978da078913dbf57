"""How a tile's range is chosen: one file each."""
