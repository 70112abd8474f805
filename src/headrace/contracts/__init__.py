"""The torch-free ground floor: interfaces and plain data that the rooms share."""
