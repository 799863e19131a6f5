"""Train D2iT. Bare, it runs the demo; the same command resumes.

python train.py
torchrun --standalone --nproc-per-node=gpu train.py --config configs/imagenet256_xl.yaml data.path=/data/imagenet
python train.py --config configs/imagenet256_xl.yaml --dry-run
"""

import sys

from d2it.training.run import command

if __name__ == "__main__":
    sys.exit(command())
