#!/bin/sh
# nvcc for the GPU at hand alone. mamba-ssm and causal-conv1d name nine architectures whatever TORCH_CUDA_ARCH_LIST says; as
# PYTORCH_NVCC this drops the others (a ninth of the time). ARCH=90 instead of asking nvidia-smi.
arch=${ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)}
n=$#
while [ "$n" -gt 0 ]; do
    if [ "$1" = -gencode ]; then
        case $2 in *"sm_$arch") set -- "$@" "$1" "$2" ;; esac
        shift 2
        n=$((n - 2))
    else
        set -- "$@" "$1"
        shift
        n=$((n - 1))
    fi
done
exec "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" "$@"
