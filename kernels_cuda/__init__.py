"""CUDA C++ kernels, compiled at run time, one file each; discovery lists this folder."""
