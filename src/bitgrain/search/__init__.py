"""Search: which layer gets which bits, so that the whole is best at a given size."""
