#!/usr/bin/env bash
# The pipeline on all GPUs of one machine: the stages that learn or measure start torchrun's processes themselves.
#
#     configs/recipes/several-gpus.sh                     # as `dvc repro`; its arguments may follow
#     TVAPRUNE_SHARD=1 configs/recipes/several-gpus.sh    # the dense model split over the GPUs, if it does not fit one
#
# learn_masks.tva.batch_size and finetune_lora.batch_size x accumulation have to be multiples of the processes.
# Several machines share one stage, in one directory that all of them see: on each of them, at the same time,
#
#     export TVAPRUNE_NPROC=8 TVAPRUNE_NNODES=2 TVAPRUNE_RENDEZVOUS=first-machine:29500
#     dvc repro -s learn_masks        # on the first, whose process 0 writes
#     python -m stages.learn_masks    # on the others
set -euo pipefail

gpus="$(nvidia-smi --list-gpus | wc -l)"
export TVAPRUNE_NPROC="${TVAPRUNE_NPROC:-$gpus}"
exec dvc repro "$@"
