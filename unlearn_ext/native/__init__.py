"""Finds a compiler, builds the C++ and CUDA sources, loads the library."""
