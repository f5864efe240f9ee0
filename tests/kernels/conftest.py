"""Triton kernels run on Triton's interpreter where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, those of its own library when it is first imported.
    os.environ["TRITON_INTERPRET"] = "1"
