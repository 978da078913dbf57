"""The twins of the native kernels: readable, in torch, on any device."""
