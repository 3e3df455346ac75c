"""The kernels of a Llama-family decoder as torch custom ops, on CPU and CUDA."""

from gqa_kernels.explain import Explanation, explain
from gqa_kernels.launch_log import record_launches
from gqa_kernels.rmsnorm import add_rmsnorm, rmsnorm

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "add_rmsnorm",
    "explain",
    "record_launches",
    "rmsnorm",
]
