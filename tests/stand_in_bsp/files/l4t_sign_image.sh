#!/bin/bash
# As NVIDIA's: a header with a signature beside one file.
exec python3 "$(readlink -f "$(dirname "$0")")/bootloader/sign_image.py" "$@"
