"""Train D2iT. Bare, it runs the demo; the same command resumes.

python train.py
torchrun --standalone --nproc-per-node=gpu train.py --config configs/imagenet256_xl.yaml data.path=/data/imagenet
python train.py --config configs/imagenet256_xl.yaml --dry-run
"""

import sys

from d2it.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
