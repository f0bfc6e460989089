"""Triton kernels, one file each; discovery lists this folder."""
