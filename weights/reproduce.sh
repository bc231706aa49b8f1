#!/usr/bin/env bash
# The trainings behind weights/results.csv and finetuning.csv, one after the other, in order of worth.
usage='usage: weights/reproduce.sh DATA TIMM
  DATA holds image folders: cifar10 and cifar100 (train, test), tiny-imagenet and imagenette (train, val).
  TIMM is a checkout of pytorch-image-models. What has ended is skipped, and what was killed goes on.
  EPOCHS of CIFAR (16), TINY_EPOCHS (8), DEVICE (cpu), DTYPE (bfloat16) and OUTPUT (output/reproduce) come from the
  environment. The defaults take two CPU cores about a day. For a GPU: DEVICE=cuda EPOCHS=300 TINY_EPOCHS=40.
  On a CPU without avx512_bf16 in /proc/cpuinfo DTYPE=float32 is faster. Rows go to results.csv and finetuning.csv in
  OUTPUT; python examples/results_table.py --results FILE prints them. Needs pip install .[downstream].'
set -euo pipefail
if [ $# != 2 ] || [ ! -d "$1" ] || [ ! -f "$2/train.py" ]; then
  echo "$usage" >&2
  exit 2
fi
data=$(realpath "$1") timm=$(realpath "$2")
cd "$(dirname "$0")/.."
epochs=${EPOCHS:-16} tiny_epochs=${TINY_EPOCHS:-8} device=${DEVICE:-cpu} dtype=${DTYPE:-bfloat16}
output=$(realpath -m "${OUTPUT:-output/reproduce}") root=$PWD
export PYTHONPATH=$root
# glibc then keeps large buffers from step to step.
export MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=16000000000
if [ "$device" = cpu ]; then
  batch=64 on=(--dtype "$dtype")
else
  batch=256 on=(--dtype "$dtype" --graphs)
fi
if [ "$dtype" = float32 ]; then
  amp=()
else
  amp=(--amp --amp-dtype "$dtype")
fi

cifar() {  # MODEL DATA NAME
  local folder=$output/$1-$2-$epochs
  if [ -e "$folder/result.csv" ]; then return; fi
  (cd "$data" && python "$root/examples/train_cifar.py" --data-dir "$2" --dataset-name "$3" --model "$1" \
    --device "$device" "${on[@]}" --batch-size $batch --epochs "$epochs" --schedule onecycle --weight-decay 5e-4 \
    --smoothing 0.1 --shift 0 --output "$folder" --results "$output/results.csv")
  if [ ! -e "$folder/result.csv" ]; then
    echo 'paused; run it again to go on'
    exit
  fi
}

results=results
stock() {  # MODEL DATA NAME CLASSES PIXELS EPOCHS SEED [OPTION...], by timm's train.py
  local split=val resume=() command folder
  folder=$output/$(IFS=; echo "$1-$2-$6-$7${*:8}")
  if [ -e "$folder/done" ]; then return; fi
  [ -e "$data/$2/val" ] || split=test
  command=(python train.py --data-dir "$2" --val-split $split --model "$1" --num-classes "$4" --img-size "$5" --seed "$7"
    --batch-size 64 --epochs "$6" --opt sgd --lr 0.1 --weight-decay 5e-4 --sched cosine --sched-on-updates
    --warmup-epochs 1 --warmup-lr 1e-3 --min-lr 0 --scale 0.25 1 --crop-pct 1 --color-jitter 0 --smoothing 0.1
    "${amp[@]}" --channels-last --checkpoint-hist 1 "${@:8}")
  if [ -e "$folder/last.pth.tar" ]; then
    resume=(--resume "$folder/last.pth.tar")
  fi
  local start=$SECONDS
  (cd "$data" && "${command[@]/#train.py/$timm/train.py}" --device "$device" --workers 2 --output "$output" \
    --experiment "$(basename "$folder")" "${resume[@]}")
  python examples/record_result.py "$folder/last.pth.tar" "$folder/model.safetensors" --timm "$timm" \
    --data-dir "$data/$2" --split $split --dataset-name "$3" --device "$device" --command "${command[*]}" \
    --results "$output/$results.csv" \
    $([ ${#resume[@]} -gt 0 ] || echo --minutes $(((SECONDS - start) / 60)))
  touch "$folder/done"
}

cifar gunn15 cifar10 CIFAR-10
stock gunn18 tiny-imagenet 'Tiny ImageNet' 200 64 "$tiny_epochs" 0
cifar sunn15 cifar10 CIFAR-10
for seed in ${SEEDS:-0}; do
  for model in gunn18 sunn18 resnet50; do
    stock $model imagenette Imagenette 10 128 5 "$seed" --lr 0.02
  done
done
# What the weights are worth: as many steps from them and from scratch.
results=finetuning
for seed in 0 1 2; do
  for start in '' --pretrained; do
    stock gunn18 imagenette Imagenette 10 64 3 $seed --lr 0.05 --warmup-epochs 0 $start
    stock gunn15 cifar100 CIFAR-100 100 32 1 $seed --lr 0.05 --warmup-epochs 0 $start
  done
  [ -e "$output/segment-$seed/unet.png" ] || python examples/segment.py --models gunn18 gunn18.tiny_in \
    --archs Unet --seed $seed --device "$device" --output "$output/segment-$seed"
done
cifar gunn15_nores cifar10 CIFAR-10
cifar gunn15.c100 cifar100 CIFAR-100
cifar sunn15.c100 cifar100 CIFAR-100
