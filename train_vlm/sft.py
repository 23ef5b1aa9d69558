"""Supervised fine-tuning: train any parts on conversations (also a from-scratch model's first stage, on dense captions).

deepspeed train_vlm/sft.py --recipe FILE [key=value ...]
"""

if __name__ == "__main__":
    from train_vlm.ending_together import end_with_launchers

    end_with_launchers()  # first: what comes now takes seconds
    from train_vlm.launching import program

    program("sft", __doc__)
