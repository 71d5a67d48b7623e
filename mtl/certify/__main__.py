"""python -m mtl.certify"""

import os
import sys

import torch

from mtl.certify.pages import main
from mtl.errors import UserError

if __name__ == "__main__":
    torch.set_num_threads(1)  # threads would only wait for each other on problems of this size
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `python -m mtl.certify loss=cagrad | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
