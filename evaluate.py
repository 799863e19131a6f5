"""Compare samples and reconstructions with real images.

python evaluate.py statistics /data/imagenet256 --inception pt_inception.pth --save imagenet256.npz
torchrun --standalone --nproc-per-node=gpu evaluate.py generation --checkpoint runs/imagenet256_xl \
    --reference imagenet256.npz --inception pt_inception.pth --count 50000
python evaluate.py reconstruction --checkpoint runs/imagenet256_xl --data /data/imagenet/val
"""

import sys

from d2it.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
