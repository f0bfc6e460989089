"""One thread in this process: tests are many small products, and a machine that runs several suites
at once spends most of its time waiting for the threads of each.

Without a GPU, Triton kernels run in Triton's interpreter, which has to be said before their import.
"""

import os

import torch

torch.set_num_threads(1)
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
