"""Devices, state, checkpoints, ranking and the training loop."""
