"""What quantization lost: float and quantized models sample the same seeds, and are compared."""
