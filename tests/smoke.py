"""What an installed wheel must do, in seconds and without the checkout: `python tests/smoke.py` in a clean environment.

The commands answer, the operators agree with their reference on every backend that is there, and a small D2iT is made,
saved, read and sampled from.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import d2it
from d2it import ops


def main() -> None:
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, d2it {d2it.__version__} in {d2it.__file__}")
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "d2it", "--help"], check=True, capture_output=True, cwd=tempfile.gettempdir())
    print(f"d2it --help: {time.perf_counter() - started:.2f} s")

    torch.manual_seed(0)
    qkv, bias = torch.randn(8, 49, 3, 4, 32), torch.randn(4, 49, 49)
    want = ops.window_attention_qkvpacked(qkv, bias, backend="reference")
    backends = [name for name in ops.available_backends("window_attention") if name in ("reference", "cpu")]
    for backend in backends:
        torch.testing.assert_close(
            ops.window_attention_qkvpacked(qkv, bias, backend=backend), want, rtol=1e-4, atol=1e-5
        )
    print(f"window attention on {', '.join(backends)}: equal")

    from d2it.models import DynamicContentTransformer, DynamicGrainTransformer, DynamicVAE

    small = {"dim": 32, "depth": 1, "heads": 2, "num_classes": 3}
    model = d2it.D2iT(
        DynamicVAE.from_preset("tiny"),
        DynamicGrainTransformer.from_preset("tiny", grid=(4, 4), **small),
        DynamicContentTransformer.from_preset("tiny", image_size=64, **small),
        sampling={"scheduler": "ddim", "steps": 2},
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        command = [sys.executable, "-m", "d2it", "sample", folder, "--count", "2"]
        subprocess.run(command, check=True, capture_output=True, cwd=tempfile.gettempdir())
        assert (Path(folder) / "samples" / "grid.png").stat().st_size > 0
    print("a D2iT saved, read and sampled from: d2it sample wrote its grid")


if __name__ == "__main__":
    main()
