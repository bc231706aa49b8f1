#!/usr/bin/env bash
# Trains what weights/results.csv is to hold, in the order of its worth, on the fastest device there is:
#   weights/reproduce.sh DATA_DIR [option of examples/train_cifar.py ...]
# DATA_DIR holds train/<class>/* and test/<class>/* of CIFAR-10 and, for CIFAR-100, torchvision's cifar-100-python.
# Said again after a kill it goes on where it stopped. NAME, EPOCHS, SEEDS and OUTPUT come from the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1
shift
name=${NAME:-CIFAR-10}
epochs=${EPOCHS:-30}
seeds=${SEEDS:-0 1 2}
output=${OUTPUT:-output/reproduce}

train() {  # FOLDER OPTION...
  local folder=$1
  shift
  if [ -e "$output/$folder/result.csv" ]; then return; fi
  python examples/train_cifar.py --data-dir "$data" --output "$output/$folder" --results weights/results.csv "$@"
  if [ ! -e "$output/$folder/result.csv" ]; then
    echo 'paused; say it again to go on'
    exit
  fi
}

# The order and the residual, at equal budget (Table 5).
for seed in $seeds; do
  for model in gunn15 sunn15 gunn15_nores; do
    train "$model-$epochs-$seed" --dataset-name "$name" --model $model --epochs "$epochs" --schedule onecycle \
      --seed "$seed" "$@"
  done
done
# The paper's schedule (Table 3).
train gunn15-300 --dataset-name "$name" --model gunn15 --epochs 300 "$@"
# The large networks, at the budget of the small ones.
for model in gunn24 sunn24; do
  train "$model-$epochs" --dataset-name "$name" --model $model --epochs "$epochs" --schedule onecycle "$@"
done
# CIFAR-100, where it is.
if [ -d "$data/cifar-100-python" ]; then
  for model in gunn15.c100 sunn15.c100; do
    train "$model-$epochs" --dataset cifar100 --model $model --epochs "$epochs" --schedule onecycle "$@"
  done
fi
