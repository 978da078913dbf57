"""Scripts that make one quantized file each with another program, and let that program measure it: see `peer_files`.

Each runs in the Python of its program, which has numpy but not bitgrain.
"""
