"""Drawn scenes: the data that is always there, so that the whole pipeline runs and learns without a download.

A scene is made up from a seed, drawn, described and asked about; the command writes training and held-out sets in the official file
formats. Questions are as hard as they look: answers are balanced per form of question, negatives are put together from what is in the
picture, and wording gives nothing away.
"""

from train_vlm.scenes.captions import caption
from train_vlm.scenes.drawing import draw
from train_vlm.scenes.forms import KINDS
from train_vlm.scenes.questions import Question, questions
from train_vlm.scenes.scene import Print, Scene, SceneObject, make_scene

__all__ = ["KINDS", "Print", "Question", "Scene", "SceneObject", "caption", "draw", "make_scene", "questions"]
