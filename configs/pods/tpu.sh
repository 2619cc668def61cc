#!/usr/bin/env bash
# An evaluation on every host of a Cloud TPU slice, and its report here.
#
#   configs/pods/tpu.sh NAME ZONE CONFIG OUT [flags of kvjax eval]
#   configs/pods/tpu.sh my-v5e-64 us-west4-a configs/eval/ruler.toml results/ruler --split 4
#
# NAME is a slice that is up (gcloud compute tpus tpu-vm create); this checkout is copied to each of
# its hosts. Run it again after anything went wrong: every host goes on from its own results. The
# model, and files that tasks read, lie where CONFIG says on every host (a mounted bucket, say).
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
name=$1 zone=$2 config=$3 out=$4
shift 4
cd "$(dirname "$0")/../.."
vm=(gcloud compute tpus tpu-vm)
everywhere() { "${vm[@]}" ssh "$name" --zone "$zone" --worker=all --command "$1"; }

packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
git archive --format=tar.gz -o "$packed/kvjax.tar.gz" HEAD
"${vm[@]}" scp "$packed/kvjax.tar.gz" "$name": --zone "$zone" --worker=all
"${vm[@]}" scp "$config" "$name":kvjax-eval.toml --zone "$zone" --worker=all
everywhere "set -e; mkdir -p kvjax && tar xzf kvjax.tar.gz -C kvjax && cd kvjax
  test -d .venv || { python3.12 -m venv .venv; .venv/bin/pip install -q -c constraints.txt -e '.[tpu]'; }"
# The same command on every host; JAX finds out which of them it is.
everywhere "cd kvjax && .venv/bin/kvjax eval --config ../kvjax-eval.toml --out results --distributed $*"
# Host i wrote results-i.jsonl: together they are one folder of results.
mkdir -p "$out"
"${vm[@]}" scp "$name":kvjax/results/'*' "$out" --zone "$zone" --worker=all
kvjax report "$out" -o "$out/report"
