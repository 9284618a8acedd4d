"""What this computer does: peak memory, and whether bf16 products pay."""
