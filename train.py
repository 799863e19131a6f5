"""Train D2iT. Bare, it runs the demo; the same command resumes.

python train.py
torchrun --standalone --nproc-per-node=gpu train.py --config configs/imagenet256_xl.yaml data.path=/data/imagenet
python train.py --config configs/imagenet256_xl.yaml --dry-run
"""

import sys
from pathlib import Path

from d2it.training.run import main

if __name__ == "__main__":
    sys.exit(main(default=Path(__file__).resolve().parent / "configs" / "demo.yaml"))
