"""What else the sampling loop can do. Each task is a short consumer of `StableDiffusion.denoise`, and yields its steps.

from minisd.tasks import finish, image_to_image, read_picture
finish(sd, image_to_image(sd, "sun", read_picture("heart.png"), strength=0.6, seed=1))[0].save("sun.png")
"""

from minisd.tasks.guidance import LossGuidance, colour_loss, compose, weighted_context
from minisd.tasks.image_to_image import image_to_image
from minisd.tasks.images import encode_pictures, finish, mean_latents, psnr
from minisd.tasks.inpainting import inpaint
from minisd.tasks.interpolation import interpolate, slerp
from minisd.tasks.inversion import edit, invert, reconstruct, round_trip
from minisd.tasks.pictures import read_mask, read_picture, to_images
from minisd.tasks.prompt_to_prompt import prompt_to_prompt

__all__ = [
    "LossGuidance",
    "colour_loss",
    "compose",
    "edit",
    "encode_pictures",
    "finish",
    "image_to_image",
    "inpaint",
    "interpolate",
    "invert",
    "mean_latents",
    "prompt_to_prompt",
    "psnr",
    "read_mask",
    "read_picture",
    "reconstruct",
    "round_trip",
    "slerp",
    "to_images",
    "weighted_context",
]
