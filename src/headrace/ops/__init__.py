"""Tensor operations: one table of references and faster versions, and the devices they run on."""
