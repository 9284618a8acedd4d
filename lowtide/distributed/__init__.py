"""Several processes for one run: the only room that knows torch.distributed."""
