"""What layers of a cache share that forget what a window has left, however they hold the rest."""

from __future__ import annotations

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class SlidingWindow(DynamicLayer):
    """In front of a class of layers; that one says by `_shrink` how what the window has left is dropped."""

    is_sliding = True
    get_mask_sizes = DynamicSlidingWindowLayer.get_mask_sizes

    def _slide(self, sliding_window: int) -> None:
        """To be called when a layer is made."""
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Drop nothing before the next `crop`."""
        self.record_past = True

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return self.sliding_window

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError("tokens that the window has left are gone: call activate_past_recording before crop")
        super().crop(tokens_to_remove)
        self.cumulative_length = max(0, self.cumulative_length + tokens_to_remove)
        self._shrink()

    def _shrink(self) -> None:
        raise NotImplementedError
