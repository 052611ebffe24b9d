"""What the server of forks imports beside the worker: PyTorch imports two hundred modules when it is
first told to be deterministic, which would take each worker a second."""

import torch

torch.use_deterministic_algorithms(True)
