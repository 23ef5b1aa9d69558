"""Supervised fine-tuning: train any parts on conversations (also a from-scratch model's first stage, on dense captions).

deepspeed train_vlm/sft.py --recipe FILE [key=value ...]
"""

import sys

from train_vlm.launching import run_program

if __name__ == "__main__":
    sys.exit(run_program("sft", __doc__))
