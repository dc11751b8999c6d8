# SPDX-License-Identifier: Apache-2.0
"""Print the root of the CUDA 13 toolkit that pip installed for this Python."""

import sys
from pathlib import Path

# A file of each wheel, relative to the root that the wheels share.
WHEELS = {
    "nvidia-cuda-nvcc": "bin/nvcc",
    "nvidia-nvvm": "nvvm/bin/cicc",
    "nvidia-cuda-crt": "include/crt/host_config.h",
    "nvidia-cuda-runtime": "lib/libcudart_static.a",
    "nvidia-cuda-cccl": "include/cccl/cuda/std/version",
}


def main() -> int:
    roots = [Path(entry) / "nvidia" / "cu13" for entry in sys.path]
    root = next((root for root in roots if (root / WHEELS["nvidia-cuda-nvcc"]).is_file()), None)
    if root is None:
        missing = list(WHEELS)
    else:
        missing = [wheel for wheel, path in WHEELS.items() if not (root / path).is_file()]
    if missing:
        wanted = " ".join(f"'{wheel}==13.0.*'" for wheel in missing)
        print(
            f"No CUDA compiler: {sys.executable} does not have {', '.join(missing)}.\n"
            f"Run: pip install {wanted}\n"
            "Or set CUDACXX to the nvcc to use (nvcc on PATH is not used by itself),\n"
            "or build without kernels: -DSPARSE_ATTN_CUDA=OFF.",
            file=sys.stderr,
        )
        return 1
    print(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
