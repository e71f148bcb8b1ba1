"""Every number of the pixel-space UNet that varies. As in `minisd.config` none has a default."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PixelUNetConfig:
    """The denoiser of Ho et al. 2020 (arXiv:2006.11239). Tuples go in the order of the walk: down from the highest
    resolution to the lowest, `up_attention` back up.
    """

    sample_size: tuple[int, int] | None  # default height and width in pixels; None: they are given at each call
    in_channels: int
    out_channels: int  # twice `in_channels` where the variance is learned
    center_input: bool  # pictures come in [0, 1] and are put into [-1, 1] first
    widths: tuple[int, ...]
    down_attention: tuple[bool, ...]  # does this resolution attend, on the way down?
    up_attention: tuple[bool, ...]  # and on the way up?
    resnets_per_level: int  # on the way down; one more on the way up
    middle: bool  # a resnet, attention and a resnet at the lowest resolution
    middle_attention: bool
    middle_scale: float  # what outputs of the middle are divided by
    middle_attention_groups: int | None  # of the norm before the middle's attention; None: no norm
    head_width: int | None  # channels of a head; None: one head
    time_width: int  # of the embedded timestep
    cosines_first: bool  # in the timestep embedding; Ho et al. have the sines first
    frequency_shift: float  # how much lower than 1/10000 its last frequency is: 1 ends at 1/10000, 0 just above
    scale_shift: bool  # the timestep scales and shifts after a norm (Dhariwal & Nichol 2021), else it is added
    class_embedding: str | None  # "table", "timestep", "identity"
    classes: int | None  # rows of the table
    activation: str
    dropout: float  # in training
    downsample: str  # "conv" or "resnet"
    upsample: str
    downsample_padding: int
    norm_groups: int
    norm_eps: float

    @property
    def skip_widths(self) -> list[int]:
        """The widths of the skips that the way down leaves for the way up, first pushed first."""
        widths = [self.widths[0]]
        for level, width in enumerate(self.widths):
            widths += [width] * (self.resnets_per_level + (level < len(self.widths) - 1))
        return widths

    def heads(self, width: int) -> int:
        """How many heads attention has at this width."""
        return width // (self.head_width or width)
