"""Quantize a GGUF file with llama.cpp: ``quantize_gguf.py BACKEND SOURCE TARGET FILE_TYPE``."""

from __future__ import annotations

import os
import sys

from peers.llama_library import load_backend, quantize

if __name__ == "__main__":
    load_backend(sys.argv[1])
    quantize(sys.argv[2], sys.argv[3], int(sys.argv[4]), len(os.sched_getaffinity(0)))
