#!/usr/bin/env bash
# Trains what weights/results.csv is to hold on CIFAR, in the order of its worth, on the fastest device there is.
usage='usage: weights/reproduce.sh DATA_DIR NAME [option of examples/train_cifar.py, for every run] ...
  DATA_DIR holds train/<class>/* and test/<class>/* of CIFAR-10 and, for CIFAR-100, torchvision'"'"'s cifar-100-python.
  NAME is what results call the image folder, such as "CIFAR-10 (JPEG copy)" for a copy that has lost something.
  EPOCHS (30), SEEDS (0 1 2) and OUTPUT (output/reproduce) come from the environment.
  Said again after a kill or a pause, it goes on.'
set -euo pipefail
if [ $# -lt 2 ] || [ ! -d "$1" ]; then
  echo "$usage" >&2
  exit 2
fi
data=$(cd "$1" && pwd)
name=$2
shift 2
cd "$(dirname "$0")/.."
epochs=${EPOCHS:-30}
seeds=${SEEDS:-0 1 2}
output=${OUTPUT:-output/reproduce}
options=("$@")

train() {  # FOLDER OPTION...
  local folder=$output/$1
  shift
  if [ -e "$folder/result.csv" ]; then return; fi
  python examples/train_cifar.py --data-dir "$data" --output "$folder" --results weights/results.csv "$@" "${options[@]}"
  if [ ! -e "$folder/result.csv" ]; then
    echo 'paused; say it again to go on'
    exit
  fi
}

cifar10() {  # FOLDER OPTION...
  train "$@" --dataset-name "$name"
}

# The order and the residual, at equal budget (Table 5).
for seed in $seeds; do
  for model in gunn15 sunn15 gunn15_nores; do
    cifar10 "$model-$epochs-$seed" --model $model --epochs "$epochs" --schedule onecycle --seed "$seed"
  done
done
# The paper's schedule, and the cyclic one of the Snapshot Ensemble (Table 3).
cifar10 gunn15-300 --model gunn15 --epochs 300
cifar10 gunn15-snapshot --model gunn15 --epochs 300 --schedule snapshot --cycles 6
# The large networks, at the budget of the small ones.
for model in gunn24 sunn24; do
  cifar10 "$model-$epochs" --model $model --epochs "$epochs" --schedule onecycle
done
# CIFAR-100, where it is.
if [ -d "$data/cifar-100-python" ]; then
  for model in gunn15.c100 sunn15.c100; do
    train "$model-$epochs" --dataset cifar100 --model $model --epochs "$epochs" --schedule onecycle
  done
fi
