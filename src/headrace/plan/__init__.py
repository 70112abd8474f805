"""Knowing the hardware, predicting runs, and simulating them on a virtual clock."""
