"""What bench/faults.py does to checkpoints, to running commands, and to folders that are shared."""
