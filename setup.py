"""Builds the C++ and CUDA operators; everything else about the package is in pyproject.toml.

One library, `d2it/_C.abi3.so`, holds the operators for both devices. It uses torch's stable ABI only:
one build serves every torch from 2.11 on, with CUDA or without.

`D2IT_BUILD` selects what to build:
    unset   CUDA and CPU where torch has CUDA and nvcc is there; CPU alone where there is a compiler; nothing
            where there is no compiler or no torch, or where the build fails (the package then runs in Python)
    none    nothing
    cpu     the CPU operators; a failure is an error
    cuda    the CPU and CUDA operators, also with a CPU torch; a failure is an error
`TORCH_CUDA_ARCH_LIST` selects for which GPUs (default "8.0;9.0;10.0+PTX").
"""

import os
import shutil
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

WANTED = os.environ.get("D2IT_BUILD", "auto")
if WANTED not in ("auto", "none", "cpu", "cuda"):
    raise SystemExit(f"D2IT_BUILD must be none, cpu or cuda, not {WANTED!r}")
TORCH_MINIMUM = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11


def cuda_home() -> Path | None:
    """Where the CUDA toolkit lies: CUDA_HOME, or beside the nvcc on the path."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    for nvcc in (
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
        *sorted(glob("/usr/local/cuda-*/bin/nvcc")),
    ):
        home = Path(nvcc or "").resolve().parent.parent
        if (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def what_to_build() -> str:
    """Settles "auto": none, cpu or cuda, for this machine. It needs no GPU: build nodes have none."""
    if WANTED != "auto":
        return WANTED
    try:
        import torch
    except ImportError:
        print(
            "d2it: torch is not importable here, so no C++ operators are built; "
            "install torch first and pass --no-build-isolation to pip"
        )
        return "none"
    if not shutil.which(os.environ.get("CXX", "c++")):
        print("d2it: no C++ compiler, so no C++ operators are built")
        return "none"
    return "cuda" if torch.version.cuda and cuda_home() else "cpu"


def extension(target: str) -> dict:
    """The arguments of setup() that build the operators for `target`, cpu or cuda."""
    from torch.utils import cpp_extension

    flags = {
        "cxx": [
            "-O3",
            "-fno-math-errno",  # a root that may set errno is not vectorised
            "-std=c++20",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
            TORCH_MINIMUM,
        ],
        "nvcc": ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden", "--threads=0", TORCH_MINIMUM],
    }
    sources = sorted(glob("csrc/*.cpp"))
    options: dict = {"include_dirs": [], "library_dirs": [], "libraries": []}
    # libtorch.so is what reaches libtorch_cuda, if there is one: see current_stream in csrc/cuda.h
    links = ["-Wl,-s", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    if target == "cuda":
        home = cuda_home()
        if home is None:
            raise SystemExit("D2IT_BUILD=cuda needs the CUDA toolkit: put nvcc on the path or set CUDA_HOME")
        cpp_extension.CUDA_HOME = str(home)  # None with a CPU torch
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
        sources += sorted(glob("csrc/*.cu"))
        options["include_dirs"] = [str(home / "include")]
        options["library_dirs"] = [str(home / "lib64")]
        links += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            # With a CPU torch nothing tells the build which headers a .cu file includes.
            headers = max(Path(header).stat().st_mtime for header in glob("csrc/*.h"))
            for built in Path(self.build_temp, "csrc").glob("*_cuda.o"):
                if built.stat().st_mtime < headers:
                    built.unlink()
            try:
                super().build_extensions()
            except Exception as error:
                if WANTED != "auto":
                    raise
                print(f"d2it: the C++ operators could not be built and are left out: {error}")

        def copy_file(self, infile, outfile, *args, **kwargs):
            """Copies beside the target and renames: a process that loads the library finds the old or the new one."""
            partial = f"{outfile}.{os.getpid()}.tmp"
            super().copy_file(infile, partial, *args, **kwargs)
            os.replace(partial, outfile)
            return outfile, True

    return {
        "ext_modules": [
            cpp_extension.CppExtension(
                "d2it._C",
                sources,
                depends=sorted(glob("csrc/*.h")),
                extra_compile_args=flags,
                extra_link_args=links,
                py_limited_api=True,
                optional=WANTED == "auto",
                **options,
            )
        ],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


target = what_to_build()
setup(
    packages=[*find_packages(include=["d2it", "d2it.*"]), "d2it.kernels", "d2it.configs"],
    **({} if target == "none" else extension(target)),
)
