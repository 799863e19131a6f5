"""Sample from a trained D2iT: images, grain maps, and grids of both.

python sample.py runs/demo
python sample.py runs/imagenet256_xl --labels 207 "golden retriever" --guidance 1.5 --photo cat.jpg
torchrun --standalone --nproc-per-node=gpu sample.py runs/imagenet256_xl --count 50000 --no-images --npz samples.npz
"""

import sys

from d2it.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
