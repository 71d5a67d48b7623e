"""python -m mtl.certify"""

import os
import sys

import torch

from mtl.certify.pages import main
from mtl.errors import UserError

if __name__ == "__main__":
    torch.set_num_threads(1)  # the problems are so small that more threads would only wait for each other
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `python -m mtl.certify loss=cagrad | head`
        # Python flushes stdout once more when it ends. Into /dev/null, or it would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
