"""Builds libgqa_kernels.so (CPU twins, and CUDA kernels where nvcc is found) and the extension module _C.

Environment: GQA_KERNELS_CUDA=0 forbids CUDA, =1 demands it; TORCH_CUDA_ARCH_LIST replaces the default architectures
"8.0 9.0a" and PTX for 8.0; CUDA_HOME names the toolkit; MAX_JOBS bounds parallel compiles; GQA_KERNELS_WERROR=1 makes
warnings errors.

The products are built inside gqa_kernels/, so the tree itself can be imported, and copied from there into the wheel.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "gqa_kernels"
TORCH_TARGET_VERSION = "0x020b000000000000ULL"  # 2.11: one binary serves every torch from there on
DEFAULT_ARCHS = "8.0 9.0a"


def find_torch() -> Path:
    """The torch package whose headers to build on: of this environment, or of the one that pip installs into."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(key)) / "torch" for key in ("purelib", "platlib")]
    for place in places:
        if (place / "include/torch/csrc/stable/library.h").exists():
            return place
    sys.exit("gqa_kernels: no torch with the stable C++ API found (needs torch>=2.11); looked in " + str(places))


def find_nvcc() -> Path | None:
    """nvcc under CUDA_HOME or on PATH, None where CUDA is not there or forbidden."""
    wish = os.environ.get("GQA_KERNELS_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"gqa_kernels: GQA_KERNELS_CUDA must be 0 or 1, got {wish!r}")
    if wish == "0":
        print("gqa_kernels: building for CPU only (GQA_KERNELS_CUDA=0)")
        return None
    home = os.environ.get("CUDA_HOME")
    found = str(Path(home) / "bin/nvcc") if home else shutil.which("nvcc")
    if found and Path(found).exists():
        return Path(found).resolve()
    if wish == "1":
        sys.exit("gqa_kernels: GQA_KERNELS_CUDA=1, but there is no nvcc on PATH or under CUDA_HOME")
    print("gqa_kernels: building for CPU only, there is no nvcc on PATH or under CUDA_HOME")
    return None


def cuda_archs() -> tuple[list[str], str]:
    """nvcc's -gencode flags and a short name of the architectures."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    archs = [arch for arch in re.split(r"[\s;]+", wish.strip()) if arch]
    if not archs:
        sys.exit(f"gqa_kernels: TORCH_CUDA_ARCH_LIST must name an architecture, got {wish!r}")
    flags, names = [], []
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.(\d+)(a?)(\+PTX)?", arch)
        if not match:
            sys.exit(f"gqa_kernels: TORCH_CUDA_ARCH_LIST must be like '8.0 9.0a+PTX', got {wish!r}")
        number = match[1] + match[2] + match[3]
        if int(match[1]) < 8:
            sys.exit(f"gqa_kernels: TORCH_CUDA_ARCH_LIST must name 8.0 or newer, got {arch!r}")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        names.append(number)
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
            names.append("ptx" + number)
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        flags.append("-gencode=arch=compute_80,code=compute_80")
        names.append("ptx80")
    return flags, " ".join(names)


class Ninja:
    """Collects compile and link steps and writes them as a ninja file; ninja parallelises and rebuilds what changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = ["ninja_required_version = 1.5", f"builddir = {folder}"]

    def rule(self, name: str, command: str, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, out: Path, rule: str, inputs: list[Path], flags: str = "") -> Path:
        self.lines += [f"build {out}: {rule} {' '.join(map(str, inputs))}", f"  flags = {flags}"]
        return out

    def compile(self, rule: str, sources: list[Path], flags: dict[str, str] | None = None) -> list[Path]:
        objects = [self.folder / source.relative_to(ROOT).with_suffix(source.suffix + ".o") for source in sources]
        for source, out in zip(sources, objects):
            self.build(out, rule, [source], (flags or {}).get(source.name, ""))
        return objects

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        script = self.folder / "build.ninja"
        script.write_text("\n".join(self.lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([sys.executable, "-m", "ninja", "-f", str(script), *jobs], check=True)


def sources(folder: str, suffix: str, exclude: tuple[str, ...] = ()) -> list[Path]:
    return sorted(path for path in (ROOT / "csrc" / folder).rglob("*" + suffix) if path.name not in exclude)


def build_libraries(module: Path) -> None:
    """Writes gqa_kernels/libgqa_kernels.so and the extension module beside it."""
    torch, nvcc = find_torch(), find_nvcc()
    library = PACKAGE / "libgqa_kernels.so"
    cxx = os.environ.get("CXX", "g++")
    strict = os.environ.get("GQA_KERNELS_WERROR") == "1"
    warnings = "-Wall -Wextra" + (" -Werror" if strict else "")
    common = f"-std=c++17 -fPIC -fvisibility=hidden {warnings} -I{ROOT}/csrc -I{ROOT}/csrc/include"

    ninja = Ninja(ROOT / "build" / ("cuda" if nvcc else "cpu") / sysconfig.get_config_var("SOABI"))
    ninja.rule("cxx", f"{cxx} {common} -O3 -fno-math-errno -MMD -MF $out.d $flags -c $in -o $out", depfile=True)
    ninja.rule(
        "cxx_torch",
        f"{cxx} {common} -O2 -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} -isystem {torch}/include"
        " -MMD -MF $out.d $flags -c $in -o $out",
        depfile=True,
    )
    # torch's include folder carries a pybind11 of its own that refuses TORCH_TARGET_VERSION: keep them apart.
    ninja.rule(
        "cxx_module",
        f"{cxx} {common} -O2 -isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
        " -MMD -MF $out.d $flags -c $in -o $out",
        depfile=True,
    )
    exports = ROOT / "csrc/exports.map"
    link = f"{cxx} -shared -Wl,--no-undefined -Wl,--version-script={exports} -Wl,-soname,libgqa_kernels.so"
    ninja.rule("link_library", f"{link} -o $out $in $flags")
    ninja.rule("link_module", f"{cxx} -shared -o $out $in $flags")

    # Arithmetic defined to the bit, the same everywhere: no contraction into FMA.
    exact = dict.fromkeys(["rope.cpp", "rotary.cpp", "sample.cpp"], "-ffp-contract=off")
    exact["sample.cpp"] += " -fno-trapping-math"  # selects between results, so that loops with divisions vectorise
    objects = ninja.compile("cxx", sources("common", ".cpp") + sources("plan", ".cpp"))
    objects += ninja.compile("cxx", sources("cpu", ".cpp"), exact)
    if nvcc:
        flags, names = cuda_archs()
        nvcc_strict = "-Werror all-warnings" if strict else ""
        ninja.rule(
            "nvcc",
            f"{nvcc} -std=c++17 -O3 --expt-relaxed-constexpr {nvcc_strict} -ccbin {cxx} {' '.join(flags)}"
            f" -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -Xptxas -v -I{ROOT}/csrc -I{ROOT}/csrc/include"
            f" -DGQA_CUDA_ARCHS='\"{names}\"' -MMD -MF $out.d $flags -c $in -o $out > $out.log 2>&1"
            " || (cat $out.log; exit 1)",
            depfile=True,
        )
        objects += ninja.compile("nvcc", sources("cuda", ".cu"))
        lib = nvcc.parent.parent / "lib64"
        ninja.build(library, "link_library", objects, f"-L{lib} -lcudart_static -ldl -lrt -lpthread")
    else:
        objects += ninja.compile("cxx", sources("nocuda", ".cpp"))
        ninja.build(library, "link_library", objects)

    ops = ninja.compile("cxx_torch", sources("ops", ".cpp", exclude=("module.cpp", "explain.cpp")))
    ops += ninja.compile("cxx_module", [ROOT / "csrc/ops/module.cpp", ROOT / "csrc/ops/explain.cpp"])
    rpath = "-Wl,-rpath,'$$ORIGIN'"
    ninja.build(module, "link_module", [*ops, library], f"-L{torch}/lib -ltorch_cpu -lc10 {rpath}")
    ninja.run()


class BuildExt(build_ext):
    """Builds in place, then copies to where setuptools looks for a wheel, an editable install or --inplace."""

    def build_extension(self, ext: Extension) -> None:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        module = PACKAGE / f"_C{suffix}"
        build_libraries(module)
        header = PACKAGE / "include/gqa_kernels.h"
        header.parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / "csrc/include/gqa_kernels.h", header)
        target = Path(self.build_lib) / "gqa_kernels"
        (target / "include").mkdir(parents=True, exist_ok=True)
        for built in (module, PACKAGE / "libgqa_kernels.so"):
            shutil.copy2(built, target / built.name)
        shutil.copy2(header, target / "include/gqa_kernels.h")


setup(ext_modules=[Extension("gqa_kernels._C", sources=[])], cmdclass={"build_ext": BuildExt})
