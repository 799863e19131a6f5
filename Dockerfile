# d2it with its CUDA operators, for a machine with an NVIDIA GPU and the NVIDIA container toolkit:
#   docker build -t d2it .
#   docker run --gpus all --ipc=host -v $PWD/runs:/runs -v /data:/data:ro d2it \
#       torchrun --standalone --nproc-per-node=gpu -m d2it train --config imagenet256_b data.path=/data/imagenet run.dir=/runs/b
# The build needs no GPU. ARCHS names the GPUs to build for.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev make && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
ARG ARCHS="8.0;9.0;10.0+PTX"
ENV TORCH_CUDA_ARCH_LIST=${ARCHS} D2IT_BUILD=cuda
RUN make wheel

# Triton compiles its launchers with a C compiler when a kernel is first used; CUDA's libraries come with torch.
FROM ubuntu:24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/d2it PATH=/opt/d2it/bin:$PATH
COPY constraints.txt /tmp/constraints.txt
COPY --from=build /src/dist/*linux*.whl /tmp/
RUN python3 -m venv $VIRTUAL_ENV \
    && pip install --no-cache-dir -c /tmp/constraints.txt "$(ls /tmp/*.whl)[train,eval,gpu]" \
    && rm /tmp/*.whl /tmp/constraints.txt
WORKDIR /runs
CMD ["d2it", "--help"]
