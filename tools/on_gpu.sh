#!/usr/bin/env bash
# Measures jaxdiff on a machine that has a GPU for minutes and need not have a network.
#
#     bash tools/on_gpu.sh STEP OUT
#
# A step takes at most nine minutes. Run again, it goes on where it stopped: what OUT/results holds
# is not measured again, and OUT/cache keeps checkpoints (44 GB in all) and compiled programs.
#
#   wheels    where there is a network: packs what tools/on_gpu_wheels.txt lists, OUT/site.tar.xz
#   install   unpacks it in OUT/site, where the other steps look; tells what is still missing
#   identity  whether images depend on slot, neighbours, padding, batch size and process
#             (tools/check_identity.py); the exit code is 1 if a promise is broken
#   sd15      Stable Diffusion 1.5 at 512 pixels, jaxdiff beside diffusers (tools/bench)
#   sdxl      Stable Diffusion XL at 1024
#   flux      FLUX.1-dev at 1024; a GPU with less than 100 GB needs OPTIONS=--one-at-a-time
#   profile   which operations of a step and of a decode take the time (tools/bench/profile.py)
#
# These variables replace a step's own settings:
#
#   MODELS    of identity and profile, MODEL of the others: as --model of tools.bench
#   BATCHES   batch sizes, in the order in which they are measured
#   PARTS     groups of parts, as --parts of tools.bench; each group is a table of its own
#   DTYPES    of identity, DTYPE of the others
#   SIZE      of images, in pixels
#   OPTIONS   more options for tools.bench: OPTIONS="--one-at-a-time --torch-compile max-autotune"
#   PYTHON    the interpreter (default: python3)
set -euo pipefail

LIMIT=540 # seconds
PYTHON=${PYTHON:-python3}
STEPS=" wheels install identity sd15 sdxl flux profile "
PLATFORMS=(manylinux{1,2014}_x86_64 manylinux_2_{17,24,27,28,31,34}_x86_64)

usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
}

run() { # COMMAND...: runs it for what is left of the nine minutes
    local left=$((LIMIT - SECONDS))
    if ((left <= 0)); then
        echo "the time is over; run the step again to go on" >&2
        exit 124
    fi
    timeout --kill-after=10 "$left" "$@"
}

wheels() {
    # Packed anew they take half of their size as wheels.
    "$PYTHON" -m pip install --quiet --no-deps --no-compile --only-binary=:all: \
        --ignore-requires-python --python-version 3.12 --implementation cp \
        "${PLATFORMS[@]/#/--platform=}" --requirement tools/on_gpu_wheels.txt \
        --upgrade --target "$OUT/site"
    tar --create --xz --file "$OUT/site.tar.xz" --directory "$OUT" site
    du --human-readable "$OUT/site.tar.xz"
}

install() {
    tar --extract --xz --file "$OUT/site.tar.xz" --directory "$OUT"
    "$PYTHON" - <<'END' | tee "$OUT/results/install.txt"
import importlib.metadata, tomllib
from packaging.requirements import Requirement

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
for line in project["dependencies"] + extras["bench"] + extras["parity"]:
    wanted = Requirement(line)
    if wanted.name == "jaxdiff" or (wanted.marker and not wanted.marker.evaluate()):
        continue
    try:
        found = importlib.metadata.version(wanted.name)
        if found not in wanted.specifier:
            print(f"wanted {line}, found {found}")
    except importlib.metadata.PackageNotFoundError:
        print(f"wanted {line}, found nothing")

import diffusers, jax, torch, jaxdiff

print("jax", jax.__version__, jax.devices(), "torch", torch.__version__, torch.cuda.is_available())
END
}

identity() {
    local batches=${BATCHES:-1 4 16} model dtype file options
    for model in ${MODELS:-sd15 sdxl}; do
        for dtype in ${DTYPES:-bfloat16 float32}; do
            file="$OUT/results/identity-${model##*/}-$dtype"
            options=(--model "$model" --dtype "$dtype" ${SIZE:+--size "$SIZE"})
            [ -e "$file.npz" ] || compare "$file" "${options[@]}" --batch "${batches// /,}"
            # Another process, which chooses its kernels anew.
            [ -e "$file-anew.npz" ] ||
                JAX_COMPILATION_CACHE_DIR=$(mktemp --directory --tmpdir="$OUT/cache") compare \
                    "$file-anew" "${options[@]}" --batch "${batches##* }" --before "$file.npz"
        done
    done
    ! grep '| yes | [1-9]' "$OUT"/results/identity-*.md # broken promises, of earlier runs, too
}

compare() { # FILE OPTION...: writes FILE.npz last, also when a promise is broken
    local file=$1 code=0
    shift
    run "$PYTHON" -m tools.check_identity "$@" --output "$file.json" --images "$file.npz" |
        tee "$file.md" || code=$?
    ((code <= 1)) || exit "$code"
}

bench() { # MODEL SIZE BATCHES PARTS OPTION...
    local model=${MODEL:-$1} size=${SIZE:-$2} batches=${BATCHES:-$3} groups=${PARTS:-$4}
    local batch parts file more
    shift 4
    read -ra more <<<"${OPTIONS:-}"
    for batch in $batches; do
        for parts in $groups; do
            file="$OUT/results/${model##*/}-$batch-${parts//,/-}"
            [ ! -e "$file.md" ] || continue # which is written last
            run "$PYTHON" -m tools.bench --model "$model" --size "$size" --batch "$batch" \
                --parts "$parts" --dtype "${DTYPE:-bfloat16}" --torch-compile default "$@" \
                "${more[@]}" --output "$file.json" --markdown "$file.md"
        done
    done
}

profile() {
    local model batch
    for model in ${MODELS:-sd15 sdxl}; do
        for batch in ${BATCHES:-8}; do
            run "$PYTHON" -m tools.bench.profile --model "$model" --batch "$batch" \
                --dtype "${DTYPE:-bfloat16}" --output "$OUT/results/profile-${model##*/}-$batch"
        done
    done
}

[[ $# == 2 && $STEPS == *" $1 "* ]] || usage
OUT=$(realpath --canonicalize-missing "$2")
cd "$(dirname "$0")/.."
mkdir --parents "$OUT/results" "$OUT/cache"
export PYTHONPATH="$PWD:$OUT/site" XDG_CACHE_HOME="$OUT/cache" HF_HUB_OFFLINE=1
export TORCHINDUCTOR_CACHE_DIR="$OUT/cache/inductor" TRITON_CACHE_DIR="$OUT/cache/triton"
all="product,images,step,decode memory"
case "$1" in
    wheels | install | identity | profile) "$1" ;;
    sd15) bench sd15 512 "8 1 32 4 16 2" "$all" ;;
    sdxl) bench sdxl 1024 "8 1 32 4 16 2" "$all" --rounds 3 --batches-a-turn 2 ;;
    # In groups, because to load and compile 12 billion weights takes minutes for each part.
    flux)
        bench flux1-dev 1024 "1 4" "product,step product,images memory" --rounds 3 --batches-a-turn 1
        ;;
esac
