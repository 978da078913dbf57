"""GGUF, the one-file format of llama.cpp: the container, and the block types that its tensors are stored in.

container  reads a file, trusting nothing; writer makes one
types      the block types by name: uint8 rows to QTensors and back
"""
