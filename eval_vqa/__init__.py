"""VQAv2, GQA and VizWiz by the official rules: predicting and scoring are separate programs with a file of predictions between them.

`vqav2`, `gqa` and `vizwiz` hold the metrics (pure functions over the parsed official files) and are commands as well. Nothing is imported
here, so that scoring never pays for torch.
"""
