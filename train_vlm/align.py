"""Alignment: train the projector between a frozen encoder and a frozen decoder.

deepspeed train_vlm/align.py --recipe FILE [key=value ...]
"""

import sys

from train_vlm.launching import run_program

if __name__ == "__main__":
    sys.exit(run_program("align", __doc__))
