"""Builds the C++ kernels where there is a compiler; without one the package installs all the same.

``EVERLONG_BUILDS`` names the builds to make (all without it); ``EVERLONG_SANITIZE=address,undefined`` makes them with
GCC's checks of every access to memory, for ``make asan``.
"""

import hashlib
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
if os.environ.get("EVERLONG_BUILDS"):
    BUILDS = {name: BUILDS[name] for name in os.environ["EVERLONG_BUILDS"].split()}
SANITIZE = []
if os.environ.get("EVERLONG_SANITIZE"):
    checks = f"-fsanitize={os.environ['EVERLONG_SANITIZE']}"
    SANITIZE = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", checks]


def sources_hash():
    """The fingerprint of the C++ sources that a library carries, as in ``ops/native/__init__.py``."""
    whole = hashlib.sha256()
    for path in sorted([*NATIVE.glob("*.cpp"), *NATIVE.glob("*.h")]):
        whole.update(path.name.encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:16]


class BuildKernels(build_ext):
    """Plain shared libraries, loaded by ctypes: no Python headers, no link to an OpenMP runtime.

    Why one was not built is kept in a file beside it, which the package quotes.
    """

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        reason = target.with_suffix(".txt")
        reason.unlink(missing_ok=True)
        try:
            objects = self.compiler.compile(
                ext.sources,
                output_dir=f"{self.build_temp}/{ext.name}",
                macros=ext.define_macros,
                extra_postargs=ext.extra_compile_args,
                depends=ext.depends,
            )
            self.compiler.link_shared_object(objects, str(target), target_lang="c++", extra_postargs=SANITIZE)
        except Exception as error:  # no compiler, or one that cannot build this: the torch forms remain
            reason.write_text(f"{error}\n")
            print(
                f"everlong: kernel {ext.name} was not built ({error}); the PyTorch forms will be used", file=sys.stderr
            )

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name)).with_suffix(".txt")
            beside = NATIVE / built.name
            beside.unlink(missing_ok=True)
            if built.exists():
                self.copy_file(str(built), str(beside))


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
            define_macros=[("EV_SOURCES", f'"{sources_hash()}"')],
            extra_compile_args=COMMON + openmp + flags + SANITIZE,
            optional=True,
        )
        for name, flags in BUILDS.items()
    ]
    if sys.platform != "win32"
    else [],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
)
