"""Lossless coding of weights: byte planes, and an entropy coder over chunks of 16384 elements.

planes         elements <-> byte planes, the exponents of bf16 and fp32 in one of their own
chunks         where chunks lie, what a coded group holds, and what damage is called
frequencies    counts -> the 12-bit frequencies that a stream is coded with
rans32         the coder: native code where there is some, else the numpy reference
"""
