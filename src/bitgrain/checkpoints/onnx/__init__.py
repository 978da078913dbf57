"""ONNX files: quantized weights as DequantizeLinear or as onnxruntime's MatMulNBits, and a reader of both.

The packages onnx, onnxscript and onnxruntime are imported where they are used: `bitgrain[onnx]` brings them.
"""
