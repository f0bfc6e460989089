"""One thread in this process: tests are many small products, and a machine that runs several suites
at once spends most of its time waiting for the threads of each."""

import torch

torch.set_num_threads(1)
