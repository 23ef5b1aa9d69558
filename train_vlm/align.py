"""Alignment: train the projector between a frozen encoder and a frozen decoder.

deepspeed train_vlm/align.py --recipe FILE [key=value ...]
"""

if __name__ == "__main__":
    from train_vlm.ending_together import end_with_launchers

    end_with_launchers()  # first: what comes now takes seconds
    from train_vlm.launching import program

    program("align", __doc__)
