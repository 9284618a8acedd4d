"""Facts about this computer: peak memory of the process, and whether bf16 products are faster."""
