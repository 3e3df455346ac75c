"""The build backend: setuptools', asking for torch only where the installing environment has none.

pip builds in isolation, so a plain requirement on torch would download and install it a second time. Inside the
isolated build ``sysconfig`` still names the installing environment, whose torch headers serve as well; setup.py looks
there.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

TORCH = "torch>=2.11"


def _torch_requirement() -> list[str]:
    headers = "torch/include/torch/csrc/stable/library.h"
    found = any((Path(sysconfig.get_path(key)) / headers).exists() for key in ("purelib", "platlib"))
    return [] if found else [TORCH]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()
