"""HuggingFace models on these kernels: ``patch(model)``, ``unpatch(model)``, ``with patched(model):``.

Importing it also registers ``attn_implementation="gqa_kernels"``, function and mask.
"""

from __future__ import annotations

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "gqa_kernels.patch needs transformers>=5.17, which is not installed: pip install 'gqa_kernels[hf]'"
    ) from error

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 17):
    raise ImportError(f"gqa_kernels.patch needs transformers>=5.17, got {transformers.__version__}")

from gqa_kernels.hf import attention_function
from gqa_kernels.hf.families import FAMILIES, Family
from gqa_kernels.hf.generation import generate, release
from gqa_kernels.hf.patching import patch, patched, unpatch
from gqa_kernels.hf.report import ModuleReport, PatchReport
from gqa_kernels.hf.sampler import GqaSampler

__all__ = [
    "FAMILIES",
    "Family",
    "GqaSampler",
    "ModuleReport",
    "PatchReport",
    "generate",
    "patch",
    "patched",
    "release",
    "unpatch",
]

attention_function.register()
