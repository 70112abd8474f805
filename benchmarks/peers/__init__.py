"""The programs that headrace is compared with: their environments, model files and drivers."""
