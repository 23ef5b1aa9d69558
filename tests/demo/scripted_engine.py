"""An engine without a model: the real processor with small tiles, and answers that are written down beforehand."""

from vlm.processing import VLMImageProcessor, VLMProcessor
from vlm.small_tokenizer import train_small_tokenizer


class ScriptedEngine:
    """Streams `pieces`; an exception among them is raised in its place. Remembers requests, and whether a stream was closed early."""

    def __init__(self, pieces=("re", "d"), max_tokens=None, max_tiles=4):
        images = VLMImageProcessor(tile_size=16, max_tiles=max_tiles)
        self.processor = VLMProcessor(images, train_small_tokenizer(["what colour is it"], 320), visual_tokens_per_tile=4)
        self.pieces, self.max_tokens = pieces, max_tokens
        self.requests, self.was_stopped = [], False

    def stream(self, request):
        self.requests.append(request)
        try:
            for piece in self.pieces:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        except GeneratorExit:
            self.was_stopped = True
            raise
