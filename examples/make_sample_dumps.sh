#!/bin/sh
# Makes the two sample dumps of the language model: one late step each, of a healthy run and of one whose label gradients are
# scatter-added in bf16. Usage: examples/make_sample_dumps.sh [DIR]   (default: dumps)
set -eu
cd "$(dirname "$0")/.."
dumps=${1:-dumps}
train() {
    name=$1
    shift
    cargo run --release --quiet --example train_lm -- --steps 400 --capture-at 399 --dumps "$dumps/$name" --run-id "$name" "$@"
}
train lm-healthy
train lm-label-scatter-bf16 --fault label-scatter-bf16
du -sh "$dumps"/lm-*
