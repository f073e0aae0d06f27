"""An mp4 from frames, and text on frames. It needs the extra "video": the ffmpeg of imageio-ffmpeg, and Pillow.

Frames are piped into the encoder one by one, so that a long video needs no more memory than a short one.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from klrl.errors import UsageError, needs, refusals
from klrl.rundir.folder import new_file

Frame = npt.NDArray[np.uint8]
_MIN_WIDTH = 320  # of a frame that is written on, in pixels


def find_encoder() -> None:
    """Raise UsageError where there is no ffmpeg."""
    with needs("video", "imageio_ffmpeg"):
        from imageio_ffmpeg import get_ffmpeg_exe
    try:
        get_ffmpeg_exe()
    except RuntimeError as problem:
        raise UsageError(f"klrl record finds no ffmpeg: {problem}") from None


class Video:
    """An mp4 that is written frame by frame, under a temporary name until it is whole."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self._fps, self._frames = path, fps, 0
        self._unfinished = path.with_name(f".writing-{path.name}")
        self._encoder: Any = None

    def add(self, frame: Frame) -> None:
        """Append a frame [H, W, 3]. Players need even sizes: of an odd one, the last row or column is doubled."""
        height, width = frame.shape[:2]
        frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        self._encoder = self._encoder or self._open(frame.shape[1], frame.shape[0])
        try:
            self._encoder.send(np.ascontiguousarray(frame))
        except OSError:
            raise OSError(f"{self.path} cannot be written: ffmpeg ended after {self._frames} frames") from None
        self._frames += 1

    def _open(self, width: int, height: int) -> Any:
        from imageio_ffmpeg import write_frames

        folder = self.path.parent
        with refusals(f"--output {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            os.close(new_file(self._unfinished))  # ffmpeg would write through a link that somebody laid there
        quality = {"quality": 8, "macro_block_size": 1, "ffmpeg_log_level": "quiet"}
        encoder = write_frames(self._unfinished, (width, height), fps=self._fps, **quality)
        encoder.send(None)
        return encoder

    def finish(self) -> None:
        """Give the video its name, unless it has it. Raises OSError unless it holds every frame."""
        from imageio_ffmpeg import count_frames_and_secs

        if self._encoder is None:
            return
        self._encoder.close()
        try:
            written, _ = count_frames_and_secs(self._unfinished)
        except RuntimeError:
            written = 0
        if written != self._frames:
            raise OSError(f"{self.path} cannot be written: {written} of {self._frames} frames arrived")
        os.replace(self._unfinished, self.path)
        self._encoder = None

    def close(self) -> None:
        """Remove the file if it was not finished."""
        if self._encoder is not None:
            self._encoder.close()
            self._unfinished.unlink(missing_ok=True)


def draw_text(frame: Frame, lines: list[str]) -> Frame:
    """The frame [H, W, 3] with text in its upper left corner; a small one is enlarged by a whole factor first."""
    from PIL import Image, ImageDraw, ImageFont

    factor = -(-_MIN_WIDTH // frame.shape[1])
    image = Image.fromarray(frame.repeat(factor, 0).repeat(factor, 1))
    canvas, font = ImageDraw.Draw(image, "RGBA"), ImageFont.load_default(max(12, image.height // 28))
    text = "\n".join(lines)
    _, _, right, bottom = canvas.multiline_textbbox((6, 4), text, font=font)
    canvas.rectangle((0, 0, right + 6, bottom + 6), fill=(0, 0, 0, 160))
    canvas.multiline_text((6, 4), text, font=font, fill="white")
    return np.asarray(image)
