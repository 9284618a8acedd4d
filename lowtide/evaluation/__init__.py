"""What quantization lost: float and packed models draw the same seeds, and the difference is measured."""
