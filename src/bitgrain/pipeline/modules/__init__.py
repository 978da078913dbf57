"""Jobs on a torch module in memory, without files: calibrate, quantize, keep packed, train with fake quantizers."""
