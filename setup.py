"""Builds the C++ kernels where there is a compiler; without one the package installs all the same."""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/everlong/ops/native")
COMMON = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fno-math-errno", "-ffp-contract=fast"]
BUILDS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    BUILDS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    BUILDS["avx512"] = [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mprefer-vector-width=512",
    ]
    BUILDS["avx512bf16"] = [*BUILDS["avx512"], "-mavx512vnni", "-mavx512bf16"]


class BuildKernels(build_ext):
    """Plain shared libraries, loaded by ctypes: no Python headers, no link to an OpenMP runtime."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext):
        try:
            objects = self.compiler.compile(
                ext.sources,
                output_dir=f"{self.build_temp}/{ext.name}",
                extra_postargs=ext.extra_compile_args,
                depends=ext.depends,
            )
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.compiler.link_shared_object(objects, str(target), target_lang="c++")
        except Exception as error:  # no compiler, or one that cannot build this: the torch forms remain
            print(
                f"everlong: kernel {ext.name} was not built ({error}); the PyTorch forms will be used", file=sys.stderr
            )


class AnyPython(bdist_wheel):
    """One wheel for every Python: the kernels are plain shared libraries."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


openmp = ["-fopenmp"] if sys.platform == "linux" else []
setup(
    ext_modules=[
        Extension(
            f"everlong.ops.native._{name}",
            [str(path) for path in sorted(NATIVE.glob("*.cpp"))],
            depends=[str(path) for path in NATIVE.glob("*.h")],
            extra_compile_args=COMMON + openmp + flags,
        )
        for name, flags in BUILDS.items()
    ]
    if sys.platform != "win32"
    else [],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
)
