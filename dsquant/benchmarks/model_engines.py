"""Run one engine of `packed_model` in a process of its own: `python -m dsquant.benchmarks.model_engines ENGINE FOLDER THREADS`.

The folder holds what `packed_model.prepare` wrote. Each line on standard input runs the model once and is answered by the
seconds that took; at the end comes the most memory that the process ever held. An engine imports what it needs alone, so that
this is its own.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL, INPUTS = "model.json", "inputs.npz"
FILES = {"dsquant packed": "packed.safetensors", "torch fp32": "float.safetensors", "onnxruntime fp32": "float.onnx"}


def peak_bytes() -> int:
    """Return the most memory that this process has held at once, VmHWM of Linux, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _torch(folder: Path, threads: int, model_of: Callable[[Path], Any]) -> Callable[[], Any]:
    import numpy as np
    import torch

    from dsquant.models import logits_of

    torch.set_num_threads(threads)
    inputs = {name: torch.from_numpy(values) for name, values in np.load(folder / INPUTS).items()}
    inputs = inputs.get("images", inputs)
    model = model_of(folder).eval()
    return torch.inference_mode()(lambda: logits_of(model, inputs))


def _packed(folder: Path, threads: int) -> Callable[[], Any]:
    from dsquant.export import load_packed

    return _torch(folder, threads, lambda folder: load_packed(folder / FILES["dsquant packed"], fast=True))


def _float(folder: Path, threads: int) -> Callable[[], Any]:
    from dsquant.config import ModelConfig
    from dsquant.models import build_model

    def model_of(folder: Path) -> Any:
        config = json.loads((folder / MODEL).read_text())
        return build_model(ModelConfig(**config, checkpoint=str(folder / FILES["torch fp32"])))

    return _torch(folder, threads, model_of)


def _onnxruntime(folder: Path, threads: int) -> Callable[[], Any]:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its threads would delay the next engine
    path = str(folder / FILES["onnxruntime fp32"])
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = dict(np.load(folder / INPUTS))
    return lambda: session.run(None, inputs)


ENGINES = {"dsquant packed": _packed, "torch fp32": _float, "onnxruntime fp32": _onnxruntime}


def serve(engine: str, folder: str, threads: str) -> None:
    """Load the engine, say so, then run it once for each line of standard input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    run = ENGINES[engine](Path(folder), int(threads))
    print("ready", file=answers)
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        print(time.perf_counter() - began, file=answers)
    print(peak_bytes(), file=answers)


if __name__ == "__main__":
    serve(*sys.argv[1:])
