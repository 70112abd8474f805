"""The torch-free engine: sequences, scheduling, page accounting, prefix tree, clock."""
