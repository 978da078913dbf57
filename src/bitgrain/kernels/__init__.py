"""CPU kernels (`bitgrain._native`, C++) on plain tensors, each with a readable twin in torch under `reference/`.

Nothing here knows of specs, modules or files: codes, scales and zero points come in as tensors.
"""
